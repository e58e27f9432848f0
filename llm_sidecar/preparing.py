"""The command line of `python -m llm_sidecar.loader`, which prepares models and adapters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from llm_sidecar import loader
from llm_sidecar.conversion import Precision, convert
from llm_sidecar.errors import SidecarError
from llm_sidecar.lora import convert_adapter
from llm_sidecar.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(f"{options.run(options)}\n")
    except SidecarError as error:
        _say(error.detail)
        return 1
    except OSError as error:
        _say(f"{error.filename or options.out}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llm_sidecar.loader", description="Prepare models for the sidecar."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = commands.add_parser(
        "convert", help="make an onnxruntime-genai folder of a transformers one"
    )
    model.add_argument("source", type=Path, metavar="SOURCE", help="a transformers folder")
    model.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    model.add_argument("--precision", choices=get_args(Precision), default="int4")
    model.set_defaults(run=_convert)
    adapter = commands.add_parser(
        "adapter", help="make an adapter for Phi-3 on onnxruntime-genai of a PEFT one"
    )
    adapter.add_argument("source", type=Path, metavar="PEFT_DIR", help="a folder of PEFT's")
    adapter.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="a folder that is not there yet: YYYYMMDD"
    )
    adapter.set_defaults(run=_convert_adapter)
    return parser


def _convert(options: argparse.Namespace) -> str:
    agreement = convert(options.source, options.out, options.precision, _say)
    distances = ", ".join(f"{distance:.3f}" for distance in agreement.distances)
    return (
        f"{options.out} agrees with {options.source}: their next tokens are "
        f"{agreement.mean:.3f} apart on average ({distances})"
    )


def _convert_adapter(options: argparse.Namespace) -> str:
    base = loader.locate_phi3(Settings.from_environ())
    moved = convert_adapter(options.source, base.folder, options.out)
    return f"{options.out} moves the next tokens of {base.label} by {moved:.3f} on average"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
