"""Where docs/troubleshooting.md says more about an error than its message does: one table for all messages."""

PAGE = "docs/troubleshooting.md"
# Heading of the page -> words of the messages that have an entry under it.
ENTRIES = {
    "Folders and disks": ("is in use by", "could not save"),
    "Checkpoints": (
        "is damaged: the checksum of",
        "is refused:",
        "is of another architecture",
        "classes: label",
        "does not say where its run stands",
    ),
    "Images": ("and no train", "has one class"),
    "Memory, data workers, signals": (
        "data workers cannot be started",
        "a data worker ended",
        "no batch came for",
        "could be read for",
        "too many open files",
        "memory ran out",
        "out of memory",
    ),
    "Several processes and machines": (
        "another process of this run ended or does not answer",
        "the processes found different checkpoints",
        "the processes read different parameters",
        "ended without a word",
    ),
}


def reference(message: str) -> str:
    """The page and the heading under which there is more about a message, in brackets; empty where there is no entry."""
    for heading, entries in ENTRIES.items():
        if any(words in message for words in entries):
            return f" ({PAGE}, {heading})"
    return ""
