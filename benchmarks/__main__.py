"""Command line: ``python -m benchmarks [bounds | snr | speed] [options]``."""

import sys

from benchmarks import bounds, snr, speed

COMMANDS = {"bounds": bounds.main, "snr": snr.main, "speed": speed.main}


def main(arguments: list[str]) -> None:
    """Run one benchmark; the main job, `bounds`, where none is named."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "bounds"
    if name not in COMMANDS:
        sys.exit(f"unknown benchmark '{name}': choose one of {', '.join(COMMANDS)}")
    try:
        COMMANDS[name](arguments[1:] if arguments and arguments[0] == name else arguments)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The main job goes on from here with --resume.")


if __name__ == "__main__":
    main(sys.argv[1:])
