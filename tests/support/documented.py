"""Commands and snippets of the documents, and a check of them that runs in any Python that has mimir_fast."""

import re
from pathlib import Path

# Given a JSON of calls, Python snippets and modules to hide: calls end after their flags are read and checked, and print the
# last line, a JSON.
CHECK = """
import argparse, contextlib, io, json, runpy, sys
asked = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(asked["absent"]))
import mimir_fast, mimir_fast.kernels, mimir_fast.cli.parser as parser
from mimir_fast.config.fields import Configuration

whole, parse = parser.configuration, argparse.ArgumentParser.parse_args

def configuration(command, given):
    # Names, types and choices; the files that a document speaks of do not exist.
    command.config.check = Configuration.check
    whole(command, given)
    raise SystemExit(0)

def parse_args(self, words=None):
    given = parse(self, words)
    if self.prog in ("mimir-fast demo", "mimir-fast report"):
        raise SystemExit(0)
    return given

parser.configuration, argparse.ArgumentParser.parse_args = configuration, parse_args
failed = []
for call in asked["calls"]:
    # Behind a launcher, and behind its own flags.
    at = call.index("mimir-fast" if "mimir-fast" in call else "-m")
    module, words = "mimir_fast.cli", [word for word in call[at + 1:] if word != "..."]
    if call[at] == "-m":
        module, *words = words
    # Without flags a command is only named; bench would run.
    if module == "bench" or not any(word.startswith("-") for word in words):
        words = [*words, "-h"]
    sys.argv, said, status = [module, *words], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = repr(error)
    if status:
        failed.append([call, status, said.getvalue()[-300:]])
for snippet in asked["snippets"]:
    exec(snippet, {})
print(json.dumps({"failed": failed, "checked": len(asked["calls"]), "package": mimir_fast.__file__}))
"""


def fenced(path: Path, language: str) -> list[str]:
    """Code blocks of a Markdown file: commands, one each, their lines joined where a backslash continues them; or whole
    snippets of another language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if language != "bash":
        return blocks
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def named_commands(paths: list[Path]) -> list[list[str]]:
    """Commands that the text names: `mimir-fast VERB`, `python -m MODULE` and what follows in the same span of code."""
    found = set()
    for path in paths:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            words = span.split()
            placeholders = any(re.search("[A-Z…]", word) for word in words)
            if not placeholders and (words[0] == "mimir-fast" or words[:2] == ["python", "-m"]) and len(words) > 1:
                found.add(tuple(words))
    return [list(words) for words in sorted(found)]
