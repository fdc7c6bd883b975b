"""Values that look wrong and are right, and mistakes that are not refused yet."""

from __future__ import annotations

__all__ = ["BY_DESIGN", "KNOWN", "NOT_CALLED"]

#: Right, and costly: minutes of processes.
NOT_CALLED = {"pg.compare(n_jobs=-1)"}

#: Pattern of a call (see `fnmatch`) -> why it is right that it is taken. What the generator draws follows the patterns too.
BY_DESIGN: dict[str, str] = {
    "pg.prior_predictive(data=four dimensions too many)": "observations are left out; only the number of rows is read",
    "pg.prior_predictive(data={'x': 'rows'})": "text is a constant argument, and this model asks but for its length",
    "pg.*(data={'x': 3.0})": "a number in a mapping is a constant argument; the model itself fails with it",
    "pg.*(data={'x': 'rows'})": "text in a mapping is a constant argument; the model itself fails with it",
    "pg.Program(guide=<class 'object'>)": "the class of an autoguide; it is made by the fit, which refuses this one",
    "pg.Program(name=*)": "any text is a name",
    "pg.Program(data_dim=0)": "the first dimension",
    "inference.Divergence(name=*)": "any text is a name",
    "pg.Recipe(name=*)": "any text is a name",
    "pg.Recipe(arguments={'no_such_site': 1.0})": "any arguments may be shown",
    "inference.SVI(lr={})": "no player is named, so each has the usual rate",
    "inference.SVI(optimiser={})": "no player is named, so each has the usual optimiser",
    "report.plot_traversal(row=3)": "the number of a row",
    "report.plot_traversal(units=[[]0[]])": "the number of a unit",
    "distances.mmd(scales=[[]2.5[]])": "the length of one kernel",
    "data.encoded(text=*)": "any text of the alphabet",
    "data.decoded(alphabet='*')": "any different characters are an alphabet",
    "pg.AIS(temperatures=3)": "three temperatures",
    "pg.fit(callbacks=[[]])": "no callbacks",
    "pg.fit(compile=False)": "the program runs at every step",
    "looking.occlusion(grey=-[0-9]*)": "any finite shade",
    "looking.*(low=-[0-9]*)": "any finite bound below the other",
    "looking.activation_maximisation(high=-[0-9]*)": "any finite bound",
    "looking.activation_maximisation(target=0)": "the first score",
    "looking.activation_maximisation(target=(0,))": "the first score",
    "looking.top_patches(channel=0)": "the first channel",
    "looking.*(layer='')": "the name of the network itself among its parts",
    "data.text_rows(text='*')": "any text of the alphabet",
    "pg.AIS(burn=0)": "the reverse chains begin at the rows as they are",
    "pg.Program(notes={'no_such_site': 1.0})": "notes have any name",
    "models.glow(blocks=0)": "a network without residual blocks",
    "models.real_nvp(blocks=0)": "a network without residual blocks",
    "models.bits_per_dimension(evidence=3)": "nats of a row",
    "models.bits_per_dimension(evidence=0.5)": "nats of a row",
}

#: Pattern of a call -> what is wrong; the test fails where one of them is fixed and still stands here.
KNOWN: dict[str, str] = {
    "inference.SVI(optimiser=<class 'object'>)": "what a function raises when it is given the parameters is not wrapped",
}
