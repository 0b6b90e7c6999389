// SPDX-License-Identifier: Apache-2.0
#include "python/bind_probe.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/probe.h"

namespace py = pybind11;

namespace ffn {
namespace {

std::vector<std::string> Names() {
  size_t count = 0;
  const char* const* const names = cpu::ComputeProbes(&count);
  return {names, names + count};
}

double Compute(const std::string& name, double seconds) {
  const double rate = [&] {
    const py::gil_scoped_release released;
    return cpu::ProbeCompute(name.c_str(), seconds);
  }();
  if (rate < 0) throw py::value_error("probe is " + name + ", but this machine has others (see probes())");
  return rate;
}

void Read(const py::buffer& buffer, size_t streams) {
  if (streams == 0) throw py::value_error("streams is 0, but a buffer is read in one or more (pass 1)");
  const py::buffer_info info = buffer.request();
  const py::gil_scoped_release released;
  cpu::ProbeRead(info.ptr, static_cast<size_t>(info.size * info.itemsize), streams);
}

}  // namespace

void BindProbe(py::module_& module) {
  module.def("probes", &Names, "What this machine multiplies with: the names that probe_compute takes.");
  module.def("probe_compute", &Compute, "Operations per second of the calling thread.");
  module.def("probe_read", &Read, "Reads a buffer once, in so many streams.");
}

}  // namespace ffn
