"""Command line: python -m benchmarks [NAME] [options].

Without a name the two main jobs run, bounds and guides, with the options that both have but for
--methods and --output; --smoke runs them in a minute, to see that all is installed.
"""

import sys

from benchmarks import (
    bounds,
    guides,
    mapa,
    mapa_images,
    neighbours,
    posteriors,
    refinement,
    snr,
    speed,
)

COMMANDS = {
    "bounds": bounds.main,
    "guides": guides.main,
    "mapa": mapa.main,
    "mapa-images": mapa_images.main,
    "neighbours": neighbours.main,
    "posteriors": posteriors.main,
    "refinement": refinement.main,
    "snr": snr.main,
    "speed": speed.main,
}
OF_ONE = ("--methods", "--output", "--train-points", "--merge")


def main(arguments: list[str]) -> None:
    """Run one benchmark; the main jobs, `bounds` and `guides`, where none is named."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is not None and name not in COMMANDS:
        sys.exit(f"unknown benchmark '{name}': choose one of {', '.join(COMMANDS)}")
    try:
        if name is None:
            main_jobs(arguments)
        else:
            COMMANDS[name](arguments[1:])
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The main jobs go on from here with --resume.")


def main_jobs(arguments: list[str]) -> None:
    """Run bounds, then guides."""
    if {"-h", "--help"} & {*arguments}:
        names = ", ".join(COMMANDS)
        sys.exit(f"{__doc__}\nNames: {names}.\nOptions: python -m benchmarks NAME --help.")
    wrong = [option for option in OF_ONE if option in arguments]
    if wrong:
        sys.exit(f"{wrong[0]} needs the name of a benchmark: choose one of {', '.join(COMMANDS)}")
    guides.parse_options(arguments)  # refuses wrong options before an hour of training
    bounds.main(arguments)
    guides.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
