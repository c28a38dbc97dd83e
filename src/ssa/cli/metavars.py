"""What a text argument stands for: types of verbs' parameters, by the word that help shows for them.

`ssa.cli.inputs.CHECKS` says of which words the value has to be there.
"""

from typing import Annotated

BUDGET = Annotated[str, "BLOCKSxSIZE"]
BUDGETS = Annotated[str, "BLOCKSxSIZE,..."]
DATA = Annotated[str, "DATA"]
DEVICE = Annotated[str, "DEVICE"]
DIRECTORY = Annotated[str, "DIRECTORY"]
DTYPE = Annotated[str, "DTYPE"]
FILE = Annotated[str, "FILE"]
INPUT = Annotated[str, "INPUT"]
NAME = Annotated[str, "NAME"]
NAMES = Annotated[str, "NAME,..."]
NUMBERS = Annotated[str, "NUMBER,..."]
OPTIONAL_RUN = Annotated[str | None, "[RUN]"]
OUT = Annotated[str, "OUT"]
PATH = Annotated[str, "PATH"]
RECIPE = Annotated[str, "CONFIG"]
RUN = Annotated[str, "RUN"]
SHOTS = Annotated[str, "SHOTS"]
SOURCE = Annotated[str, "SOURCE"]
TEXT = Annotated[str, "TEXT"]
TOKENIZER = Annotated[str, "TOKENIZER"]
