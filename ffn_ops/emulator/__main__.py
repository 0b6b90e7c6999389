# SPDX-License-Identifier: Apache-2.0
"""python -m ffn_ops.emulator [--soc NAME] [--devices N] (script.py | -m module) [arguments]"""

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from ffn_ops import emulator

parser = argparse.ArgumentParser(
    prog="python -m ffn_ops.emulator",
    usage="%(prog)s [--soc NAME] [--devices N] (script.py | -m module) [arguments]",
    description="Runs a script or a module on emulated NPUs.",
)
parser.add_argument("--soc", default="Ascend910B1", help="what aclrtGetSocName answers")
parser.add_argument("--devices", type=int, default=2, help="how many NPUs there are")
parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="the module, and its arguments")
parser.add_argument("script", nargs=argparse.REMAINDER, help="the script, and its arguments")
chosen = parser.parse_args()
arguments = chosen.module or chosen.script
if not arguments:
    parser.error("there is nothing to run (name a script, or -m and a module)")
name = arguments[0]
# Before enable(), which takes seconds.
if chosen.module and not find_spec(name.partition(".")[0]):
    parser.error(f"there is no module {name} (install it, or correct its name)")
if not chosen.module and not Path(name).exists():
    parser.error(f"there is no script {name} (correct its path)")
try:
    emulator.enable(chosen.soc, chosen.devices)
except ValueError as error:
    parser.error(str(error))
sys.argv = arguments
if chosen.module:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
else:
    sys.path[0] = str(Path(name).resolve().parent)  # as Python does for a script
    runpy.run_path(name, run_name="__main__")
