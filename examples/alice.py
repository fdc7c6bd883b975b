"""A character model of Alice's Adventures in Wonderland: bits per character as it learns, and text at temperatures."""

import math
import os
import textwrap

from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.data import decoded, encoded
from ppl_gen.data.text import ALPHABET
from ppl_gen.inference import SVI
from ppl_gen.models import bits_per_character, char_rnn

quick = bool(os.environ.get("PPL_GEN_QUICK"))
train, test = pg.load_data("alice", split="train"), pg.load_data("alice", split="test")
if quick:
    train = {name: value[:100] for name, value in train.items()}

recipe = char_rnn(len(ALPHABET), cell="gru", hidden=32 if quick else 192)
algorithm = SVI(steps=20 if quick else 600, batch_size=32, lr=5e-3, clip_norm=1.0)
fit = pg.fit(recipe, train, algorithm, seed=0, validation=test, validate_every=5 if quick else 50)
bits = bits_per_character(fit, test)
print(fit, f"\n{bits:.3f} bits per character of the held-out part")

prompt = "The Queen"
network = fit.module("network")
texts = {
    heat: prompt + decoded(network.generate(1, 300, temperature=heat, prompt=encoded(prompt), seed=1))[0]
    for heat in (0.5, 0.8, 1.0)
}
for heat, text in texts.items():
    print(f"\n--- temperature {heat}\n{text}")

per_row = math.log(2) * float(train["lengths"].double().mean())  # the loss is in nats per row
held_out = math.log(2) * float(test["lengths"].double().mean())
figure = Figure(figsize=(12, 5), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
left.plot(fit.history["step"], fit.history["program_loss"] / per_row, lw=0.8, label="training batches")
left.plot(fit.history["check"], -fit.history["validation_evidence"] / held_out, "o-", label="held-out text")
left.axhline(math.log2(len(ALPHABET)), color="grey", ls=":", label="uniform")
left.set(xlabel="step", ylabel="bits per character")
left.legend()
right.axis("off")
shown = [f"temperature {heat}\n{textwrap.fill(' '.join(text.split()), 70)}" for heat, text in texts.items()]
right.text(0, 1, "\n\n".join(shown), family="monospace", fontsize=8.5, va="top", parse_math=False)
figure.savefig("alice.png", dpi=120)
assert bits < math.log2(len(ALPHABET)) - (0 if quick else 2), "it has learned far more than the alphabet"
