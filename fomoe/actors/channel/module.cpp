// Python bindings of the fabric; layout.h describes the memory and the protocol.
#include <cstdint>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "inlet.h"
#include "layout.h"
#include "plane.h"
#include "ring.h"
#include "sync.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace fomoe;

template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint64_t* word_at(Vector<uint64_t>& words, int64_t index) {
    if (index < 0 || size_t(index) >= words.shape(0)) throw nb::index_error("no such word");
    return words.data() + index;
}

}  // namespace

NB_MODULE(_channel, m) {
    // Actors freeze the garbage collector (gc.freeze), so objects live on at exit by intent.
    nb::set_leak_warnings(false);
    m.attr("ABSENT") = uint32_t(kAbsent);
    m.attr("ALIVE") = uint32_t(kAlive);

    nb::class_<Layout>(m, "Layout")
        .def(nb::init<uint32_t, uint32_t, std::vector<uint64_t>, uint32_t, uint32_t>(),
             "processes"_a, "rings"_a, "arenas"_a, "ring_slots"_a, "slot_bytes"_a)
        .def_ro("total_bytes", &Layout::total_bytes)
        .def_ro("arena_offsets", &Layout::arena_offsets);

    nb::class_<Plane>(m, "Plane")
        .def(nb::init<nb::object, const Layout&>(), "memory"_a, "layout"_a)
        .def("format", &Plane::format, "fabric_id"_a, "digest"_a, "ends"_a)
        .def("refusal", &Plane::refusal, "fabric_id"_a, "digest"_a)
        .def("join", &Plane::join, "process"_a, "pid"_a, "starttime"_a)
        .def("leave", &Plane::leave, "process"_a, "dead"_a)
        .def("lose", &Plane::lose, "process"_a)
        .def("gone", &Plane::gone, "process"_a)
        .def("describe", &Plane::describe, "process"_a)
        .def("bell", &Plane::bell, "process"_a)
        .def("ring", &Plane::ring, "process"_a)
        .def("wait", &Plane::wait, "process"_a, "seen"_a, "spin_us"_a, "timeout_ms"_a);

    nb::class_<Ring>(m, "Ring")
        .def(nb::init<Plane&, uint32_t>(), "plane"_a, "index"_a, nb::keep_alive<1, 2>())
        .def("try_send", &Ring::try_send, "tag"_a, "payload"_a)
        .def("try_recv", &Ring::try_recv, "into"_a)
        .def("wait_space", &Ring::wait_space, "spin_us"_a, "timeout_ms"_a)
        .def("used", &Ring::used)
        .def("consumed", &Ring::consumed)
        .def("producer_gone", &Ring::producer_gone)
        .def("consumer_gone", &Ring::consumer_gone);

    nb::class_<Inlet>(m, "Inlet")
        .def(nb::init<Plane&, Ring*, uint32_t, int>(), "plane"_a, "ring"_a.none(), "me"_a, "fd"_a,
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("pump", &Inlet::pump, "slice_ms"_a)
        .def("quiet_s", &Inlet::quiet_s)
        .def("count_sent", &Inlet::count_sent)
        .def("sent", &Inlet::sent)
        .def("in_flight", &Inlet::in_flight)
        .def("wait_credit", &Inlet::wait_credit, "slots"_a, "timeout_ms"_a)
        .def("wake", &Inlet::wake);

    m.def(
        "store_release_u64",
        [](Vector<uint64_t> words, int64_t index, uint64_t value) {
            store_release(word_at(words, index), value);
        },
        "words"_a, "index"_a, "value"_a);
    m.def(
        "load_acquire_u64",
        [](Vector<uint64_t> words, int64_t index) { return load_acquire(word_at(words, index)); },
        "words"_a, "index"_a);
}
