# SPDX-License-Identifier: Apache-2.0
"""python -m ffn_ops.emulator [--soc NAME] [--devices N] script.py [arguments]: a script on emulated NPUs."""

import argparse
import runpy
import sys

from ffn_ops import emulator

parser = argparse.ArgumentParser(
    prog="python -m ffn_ops.emulator", description="Runs a script on emulated NPUs."
)
parser.add_argument("--soc", default="Ascend910B1", help="what aclrtGetSocName answers")
parser.add_argument("--devices", type=int, default=2, help="how many NPUs there are")
parser.add_argument("script")
parser.add_argument("arguments", nargs=argparse.REMAINDER)
chosen = parser.parse_args()
emulator.enable(chosen.soc, chosen.devices)
sys.argv = [chosen.script, *chosen.arguments]
runpy.run_path(chosen.script, run_name="__main__")
