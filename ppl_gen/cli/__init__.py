"""The command line: every option is an argument of the library, and nothing is computed here."""

from ppl_gen.cli.app import main
from ppl_gen.cli.parsing import algorithm_of, data_of, program_of

__all__ = ["algorithm_of", "data_of", "main", "program_of"]
