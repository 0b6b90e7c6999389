# SPDX-License-Identifier: Apache-2.0
"""How fast ours is beside the peers, in the open: `python -m benchmarks`, or `make bench`.

__main__.py is the command line. run.py starts one process (worker.py) for each shape and mode, so that no
peer can take the benchmark down. cases.py makes the operands, check.py holds every output to the cell's
bound, measure.py times, machine.py says what the machine is and what it could do, report.py writes the table,
the results file, the plots and docs/benchmarks.md. peers.py has one class for each competitor, and so have
the modules named after packages; encoder.py has a whole model. Benchmarks never assert, and tests never time.
"""

# Before torch: where torch_npu is installed without CANN, torch alone cannot be imported.
import ffn_ops as _ffn_ops  # noqa: F401
