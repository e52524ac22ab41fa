// Python bindings of the fabric; layout.h describes the memory and the protocol.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "layout.h"
#include "sync.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace fomoe;

// A contiguous buffer of a Python object, held for the life of this object.
class Buffer {
  public:
    Buffer(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    size_t size() const { return size_t(view_.len); }

  private:
    Py_buffer view_;
};

[[noreturn]] void raise_channel_error(const std::string& message) {
    nb::object type = nb::module_::import_("fomoe.errors").attr("ChannelError");
    PyErr_SetString(type.ptr(), message.c_str());
    throw nb::python_error();
}

uint64_t microseconds(double us) { return us > 0 ? uint64_t(us * 1e3) : 0; }
uint64_t milliseconds(double ms) { return ms > 0 ? uint64_t(ms * 1e6) : 0; }

class Plane {
  public:
    Plane(nb::object memory, const Layout& layout)
        : layout_(layout), buffer_(memory, PyBUF_SIMPLE | PyBUF_WRITABLE),
          lost_(new uint8_t[layout.processes]()) {
        if (buffer_.size() != layout.total_bytes)
            raise_channel_error("the fabric has " + std::to_string(buffer_.size()) +
                                " bytes, its spec needs " + std::to_string(layout.total_bytes));
        if (reinterpret_cast<uintptr_t>(buffer_.data()) % kLine != 0)
            raise_channel_error("the fabric's memory is not aligned to 64 bytes");
    }

    void format(nb::bytes fabric_id, nb::bytes digest,
                const std::vector<std::pair<uint32_t, uint32_t>>& ends);
    nb::object refusal(nb::bytes fabric_id, nb::bytes digest) const;

    uint32_t join(uint32_t process, uint32_t pid, uint64_t starttime) {
        Member* m = member(process);
        uint32_t state = kAbsent;
        if (!__atomic_compare_exchange_n(&m->state, &state, uint32_t(kJoining), false,
                                         __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return state;
        m->pid = pid;
        m->starttime = starttime;
        store_ordered(&m->state, uint32_t(kAlive));
        return kAbsent;
    }

    void leave(uint32_t process, bool dead) {
        uint32_t state = kAlive;
        __atomic_compare_exchange_n(&member(process)->state, &state,
                                    uint32_t(dead ? kDead : kClosed), false, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST);
        wake_all();
    }

    void lose(uint32_t process) {
        member(process);
        __atomic_store_n(&lost_[process], 1, __ATOMIC_SEQ_CST);
        wake_all();
    }

    bool gone(uint32_t process) const {
        return load_acquire(&member(process)->state) >= kClosed ||
               __atomic_load_n(&lost_[process], __ATOMIC_ACQUIRE) != 0;
    }

    nb::tuple describe(uint32_t process) const {
        const Member* m = member(process);
        const uint32_t state = load_acquire(&m->state);
        return nb::make_tuple(state, m->pid, m->starttime);
    }

    uint32_t bell(uint32_t process) const { return load_acquire(&member(process)->bell); }

    void ring(uint32_t process) {
        Member* m = member(process);
        bump(&m->bell, &m->sleepers);
    }

    bool wait(uint32_t process, uint32_t seen, double spin_us, double timeout_ms) {
        Member* m = member(process);
        auto rung = [=] { return load_ordered(&m->bell) != seen; };
        if (rung()) return true;
        nb::gil_scoped_release release;
        if (spin_until(rung, microseconds(spin_us))) return true;
        if (timeout_ms > 0)
            sleep_once(&m->bell, seen, &m->sleepers, rung, milliseconds(timeout_ms));
        return rung();
    }

    Member* member(uint32_t i) const {
        if (i >= layout_.processes) throw nb::index_error("no such process");
        return reinterpret_cast<Member*>(buffer_.data() + layout_.first_member()) + i;
    }

    RingHeader* ring_header(uint32_t i) const {
        if (i >= layout_.rings) throw nb::index_error("no such ring");
        return reinterpret_cast<RingHeader*>(buffer_.data() + layout_.first_ring() +
                                             i * layout_.ring_bytes());
    }

    const Layout& layout() const { return layout_; }

  private:
    FabricHeader* header() const { return reinterpret_cast<FabricHeader*>(buffer_.data()); }

    void wake_all() {
        for (uint32_t i = 0; i < layout_.processes; ++i) ring(i);
        for (uint32_t i = 0; i < layout_.rings; ++i) {
            RingHeader* r = ring_header(i);
            bump(&r->space, &r->producer_sleepers);
        }
    }

    Layout layout_;
    Buffer buffer_;
    std::unique_ptr<uint8_t[]> lost_;  // remote peers that this process lost; not shared
};

void Plane::format(nb::bytes fabric_id, nb::bytes digest,
                   const std::vector<std::pair<uint32_t, uint32_t>>& ends) {
    FabricHeader* h = header();
    if (fabric_id.size() != sizeof(h->fabric_id) || digest.size() != sizeof(h->spec_digest) ||
        ends.size() != layout_.rings)
        throw nb::value_error("format: wrong size of fabric_id, digest or ring list");
    h->version = kVersion;
    h->processes = layout_.processes;
    h->rings = layout_.rings;
    h->arenas = uint32_t(layout_.arena_bytes.size());
    h->ring_slots = layout_.ring_slots;
    h->slot_bytes = layout_.slot_bytes;
    h->total_bytes = layout_.total_bytes;
    std::memcpy(h->fabric_id, fabric_id.c_str(), sizeof(h->fabric_id));
    std::memcpy(h->spec_digest, digest.c_str(), sizeof(h->spec_digest));
    for (uint32_t i = 0; i < layout_.rings; ++i) {
        member(ends[i].first);
        member(ends[i].second);
        ring_header(i)->from = ends[i].first;
        ring_header(i)->to = ends[i].second;
    }
    store_release(&h->magic, kMagic);
}

nb::object Plane::refusal(nb::bytes fabric_id, nb::bytes digest) const {
    const FabricHeader* h = header();
    auto differs = [](const uint8_t* field, size_t n, const nb::bytes& wanted) {
        return wanted.size() != n || std::memcmp(field, wanted.c_str(), n) != 0;
    };
    if (load_acquire(&h->magic) != kMagic) return nb::str("it is not a fabric");
    if (h->version != kVersion) return nb::str("it has another version of the layout");
    if (differs(h->fabric_id, sizeof(h->fabric_id), fabric_id))
        return nb::str("it is another fabric");
    if (differs(h->spec_digest, sizeof(h->spec_digest), digest) ||
        h->total_bytes != layout_.total_bytes)
        return nb::str("it was made for another spec");
    return nb::none();
}

class Ring {
  public:
    Ring(Plane& plane, uint32_t index)
        : plane_(plane), h_(plane.ring_header(index)), slots_(plane.layout().ring_slots),
          slot_bytes_(plane.layout().slot_bytes), stride_(plane.layout().slot_stride()),
          from_(h_->from), to_(h_->to), known_tail_(load_acquire(&h_->tail)) {
        plane.member(from_);
        plane.member(to_);
    }

    bool try_send(uint32_t tag, nb::handle payload) {
        Buffer data(payload, PyBUF_SIMPLE);
        if (data.size() > slot_bytes_)
            raise_channel_error("a message of " + std::to_string(data.size()) +
                                " bytes does not fit a slot of " + std::to_string(slot_bytes_) +
                                "; put it into an arena");
        const uint64_t head = load_relaxed(&h_->head);
        if (full(head)) return false;
        SlotHeader* slot = slot_at(head);
        slot->position = head;
        slot->tag = tag;
        slot->nbytes = uint32_t(data.size());
        std::memcpy(slot + 1, data.data(), data.size());
        store_release(&h_->head, head + 1);
        plane_.ring(to_);
        return true;
    }

    nb::object try_recv(nb::handle into) {
        const uint64_t tail = load_relaxed(&h_->tail);
        if (load_acquire(&h_->head) == tail) return nb::none();
        const SlotHeader* slot = slot_at(tail);
        const uint32_t tag = slot->tag, nbytes = slot->nbytes;
        if (slot->position != tail || nbytes > slot_bytes_)
            raise_channel_error("the ring is damaged at message " + std::to_string(tail));
        {
            Buffer out(into, PyBUF_SIMPLE | PyBUF_WRITABLE);
            if (out.size() < nbytes)
                raise_channel_error("a message of " + std::to_string(nbytes) +
                                    " bytes does not fit a buffer of " +
                                    std::to_string(out.size()));
            std::memcpy(out.data(), slot + 1, nbytes);
        }
        store_ordered(&h_->tail, tail + 1);
        if (load_ordered(&h_->producer_sleepers) != 0) {
            add_ordered(&h_->space, 1);
            futex_wake(&h_->space);
        }
        return nb::make_tuple(tag, nbytes);
    }

    bool wait_space(double spin_us, double timeout_ms) {
        auto ready = [this] {
            return load_ordered(&h_->head) - load_ordered(&h_->tail) < slots_ || plane_.gone(to_);
        };
        if (ready()) return true;
        nb::gil_scoped_release release;
        if (spin_until(ready, microseconds(spin_us))) return true;
        const uint32_t seen = load_acquire(&h_->space);
        if (timeout_ms > 0)
            sleep_once(&h_->space, seen, &h_->producer_sleepers, ready, milliseconds(timeout_ms));
        return ready();
    }

    uint64_t used() const { return load_acquire(&h_->head) - load_acquire(&h_->tail); }
    uint64_t consumed() const { return load_acquire(&h_->tail); }
    bool producer_gone() const { return plane_.gone(from_); }
    bool consumer_gone() const { return plane_.gone(to_); }

  private:
    // `known_tail_` spares the consumer's cache line while the ring is known to have room.
    bool full(uint64_t head) {
        if (head - known_tail_ < slots_) return false;
        known_tail_ = load_acquire(&h_->tail);
        return head - known_tail_ >= slots_;
    }

    SlotHeader* slot_at(uint64_t position) const {
        uint8_t* first = reinterpret_cast<uint8_t*>(h_ + 1);
        return reinterpret_cast<SlotHeader*>(first + position % slots_ * stride_);
    }

    Plane& plane_;
    RingHeader* h_;
    uint64_t slots_;
    uint32_t slot_bytes_;
    size_t stride_;
    uint32_t from_, to_;
    uint64_t known_tail_;
};

template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint64_t* word_at(Vector<uint64_t>& words, int64_t index) {
    if (index < 0 || size_t(index) >= words.shape(0)) throw nb::index_error("no such word");
    return words.data() + index;
}

size_t landed(Vector<const uint64_t> words, Vector<const int32_t> slots,
              Vector<const uint64_t> generations, Vector<uint8_t> out) {
    const size_t n = slots.shape(0);
    if (generations.shape(0) != n || out.shape(0) != n)
        throw nb::value_error("slots, generations and out differ in length");
    for (size_t i = 0; i < n; ++i)
        if (slots(i) < 0 || size_t(slots(i)) >= words.shape(0))
            throw nb::index_error("no such word");
    size_t count = 0;
    for (size_t i = 0; i < n; ++i) {
        out(i) = load_acquire(words.data() + slots(i)) >= generations(i);
        count += out(i);
    }
    return count;
}

}  // namespace

NB_MODULE(_channel, m) {
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
    m.def("landed", &landed, "words"_a, "slots"_a, "generations"_a, "out"_a);
}
