"""python -m bench compile: compile every kernel for A100 and H100 and read the machine code (no GPU needed)."""

import sys

VERBS = ("compile",)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in VERBS:
        print(f"usage: python -m bench {{{','.join(VERBS)}}}", file=sys.stderr)
        return 2
    from bench import compile

    return compile.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
