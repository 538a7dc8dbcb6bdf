"""Command line: python -m benchmarks [NAME] [options].

Without a name the two main jobs run, bounds and guides, with all options but --methods and
--output; --smoke runs them in a minute, to see that all is installed.
"""

import sys

from benchmarks import (
    bounds,
    encoder_starts,
    examples,
    guides,
    mapa,
    mapa_images,
    neighbours,
    posteriordb,
    posteriors,
    refinement,
    reproduce,
    snr,
    speed,
    starts,
    stopping,
)

MODULES = (
    bounds,
    encoder_starts,
    examples,
    guides,
    mapa,
    mapa_images,
    neighbours,
    posteriordb,
    posteriors,
    refinement,
    reproduce,
    snr,
    speed,
    starts,
    stopping,
)
COMMANDS = {m.__name__.partition(".")[2].replace("_", "-"): m for m in MODULES}


def main(arguments: list[str]) -> None:
    """Run one benchmark; the main jobs, `bounds` and `guides`, where none is named."""
    names = ", ".join(COMMANDS)
    try:
        if not arguments or arguments[0].startswith("-"):
            if {"-h", "--help"} & {*arguments}:
                sys.exit(f"{__doc__}\nNames: {names}.\nOptions: python -m benchmarks NAME --help.")
            for option in {"--methods", "--output"} & {*arguments}:
                sys.exit(f"{option} needs the name of a benchmark: {names}")
            bounds.main(arguments)
            guides.main(arguments)
        elif arguments[0] in COMMANDS:
            COMMANDS[arguments[0]].main(arguments[1:])
        else:
            sys.exit(f"unknown benchmark '{arguments[0]}': choose one of {names}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The main jobs go on from here with --resume.")


if __name__ == "__main__":
    main(sys.argv[1:])
