"""The command line, `mimir-fast VERB [flags]`; each verb's module also runs by itself."""

import importlib
import os
import signal
import sys

VERBS = {
    "pretrain": ("mimir_fast.cli.pretrain", "adversarial masked-autoencoder pre-training"),
    "finetune": ("mimir_fast.cli.finetune", "from a pre-trained encoder to a robust classifier"),
    "evaluate": ("mimir_fast.cli.evaluate", "a classifier's accuracy, clean and under attack"),
    "analyze": ("mimir_fast.cli.analyze", "what a checkpoint's features tell about images and perturbations"),
    "export": ("mimir_fast.cli.export", "a trained encoder or classifier as a file for timm or RobustBench"),
    "cache": ("mimir_fast.cli.cache", "decoded images on disk, from which training reads many times as fast"),
    "demo": ("mimir_fast.cli.demo", "all of it on handwritten digits, on two CPU cores"),
    "memory": ("mimir_fast.cli.memory", "peak memory of a training and the largest batch that fits; needs no GPU"),
    "tune": ("mimir_fast.cli.tune", "which implementations are the fastest on this machine, measured ahead"),
    "report": ("mimir_fast.cli.report", "HTML report of a run's folder"),
}
# Verbs of earlier versions and what they are called now.
RENAMED = {"fit": "memory"}
# How often a thread of OpenMP (GNU's, torch's on Linux) looks for work before it sleeps, by default 300,000 times.  Where other
# programs share the processors, that burns what the thread it waits for needs: two threads then train at a tenth of the speed.
SPINS = "5000"


def usage() -> str:
    """The text of `mimir-fast -h`."""
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items())
    return f"usage: mimir-fast VERB [flags]\n\nverbs:\n{verbs}\n\nmimir-fast VERB -h explains a verb's flags."


def run_verb(verb: str, words: list[str], alone: bool = True) -> int:
    """Import and run a verb; returns its exit status.  alone: whether the process ends after it."""
    # Read when torch is imported, which the verb's module does.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        status = importlib.import_module(VERBS[verb][0]).main(words)
    except KeyboardInterrupt:
        # While its modules are imported, which takes seconds, or once more while it ended.
        print(f"mimir-fast {verb}: stopped", file=sys.stderr)
        status = 130
    if alone and status == 130:
        # Whoever presses Ctrl-C again while Python ends would see tracebacks of what it closes.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def main(argv: list[str] | None = None) -> int:
    """Dispatch to a verb; returns its exit status, 2 for a word that is no verb."""
    alone, argv = argv is None, sys.argv[1:] if argv is None else argv
    # A verb is imported when it is called: importing all of them takes seconds.
    if argv and argv[0] in VERBS:
        return run_verb(argv[0], argv[1:], alone)
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv and argv[0] in RENAMED:
        print(
            f"mimir-fast: error: {argv[0]} is called {RENAMED[argv[0]]} now: mimir-fast {RENAMED[argv[0]]}",
            file=sys.stderr,
        )
        return 2
    print(usage() if not argv else f"mimir-fast: error: {argv[0]!r} is no verb\n{usage()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
