"""What is chosen between: problems, candidates, choices, and their form as text in flags, config.yaml and checkpoints."""

import re
from dataclasses import dataclass

# Words of --tune that are no choices.
AUTO, OFF, AGAIN = WORDS = ("auto", "off", "again")
# Operations -> what the numbers of their problems are.
OPERATIONS = {"attention": ("tokens", "heads", "numbers per head"), "mlp": ("width", "hidden width")}
DTYPES = ("bf16", "fp16", "fp32")
CHOICE = re.compile(r"(\w+) (\d+(?:x\d+)*) (\w+)=(\w+)(?:/(\w+))?")


@dataclass(frozen=True)
class Problem:
    """One operation of a run.

    op      attention or mlp
    sizes   attention: tokens, heads, numbers per head; mlp: width, hidden width
    dtype   bf16, fp16 or fp32
    batch   images of an attention, rows (tokens of all images) of an MLP.  Not part of a choice: one for all batches
    """

    op: str
    sizes: tuple[int, ...]
    dtype: str
    batch: int = 0

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.sizes))} {self.dtype}"

    @property
    def place(self) -> "Problem":
        """The problem without its batch."""
        return Problem(self.op, self.sizes, self.dtype)

    @property
    def flops(self) -> float:
        """Of the products of both passes; a multiply-add is two."""
        if self.op == "mlp":
            width, hidden = self.sizes
            return 12.0 * self.batch * width * hidden
        tokens, heads, head = self.sizes
        # Two products forward, five backward, of which one is computed again.
        return 14.0 * self.batch * heads * tokens**2 * head

    @property
    def bytes(self) -> float:
        """Of activations that both passes cannot but read and write."""
        size = 4 if self.dtype == "fp32" else 2
        if self.op == "mlp":
            width, hidden = self.sizes
            return float(size * self.batch * (5 * width + 5 * hidden))
        tokens, heads, head = self.sizes
        # In units of the output: qkv 3 read, output 1 written; qkv 3 and the gradient 1 read, qkv's gradient 3 written.
        return 11.0 * size * self.batch * tokens * heads * head


@dataclass(frozen=True)
class Candidate:
    """An implementation by the name that --attention or --mlp takes; tiles: sizes of our kernel by name, "" its own."""

    name: str
    tiles: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.tiles}" if self.tiles else self.name


Choices = dict[Problem, Candidate]


def as_text(choices: Choices) -> str:
    """One line: `attention 50x12x64 bf16=short, mlp 768x3072 bf16=triton/wide`."""
    return ", ".join(f"{problem}={candidate}" for problem, candidate in choices.items())


def from_text(text: str) -> Choices:
    """The choices of a line that `as_text` wrote.  Raises ValueError for any other text."""
    choices: Choices = {}
    for part in text.split(", "):
        found = CHOICE.fullmatch(part)
        if not found or found[1] not in OPERATIONS or found[3] not in DTYPES:
            raise ValueError(f"tune: got {part!r}, expected {', '.join(WORDS)} or choices as config.yaml has them")
        sizes = tuple(map(int, found[2].split("x")))
        if len(sizes) != len(OPERATIONS[found[1]]):
            raise ValueError(f"tune: got {part!r}, expected {' x '.join(OPERATIONS[found[1]])}")
        choices[Problem(found[1], sizes, found[3])] = Candidate(found[4], found[5] or "")
    return choices


def check_tune(text: str) -> None:
    """Raise ValueError unless it is a word or choices."""
    if text not in WORDS:
        from_text(text)
