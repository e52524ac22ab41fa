// Header, process table and bells of a mapped fabric, and what the bindings share.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>

#include "layout.h"
#include "sync.h"

namespace fomoe {

namespace nb = nanobind;

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

[[noreturn]] inline void raise_channel_error(const std::string& message) {
    nb::object type = nb::module_::import_("fomoe.errors").attr("ChannelError");
    PyErr_SetString(type.ptr(), message.c_str());
    throw nb::python_error();
}

inline uint64_t microseconds(double us) { return us > 0 ? uint64_t(us * 1e3) : 0; }
inline uint64_t milliseconds(double ms) { return ms > 0 ? uint64_t(ms * 1e6) : 0; }

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
    uint8_t* arena(size_t i) const { return buffer_.data() + layout_.arena_offsets[i]; }

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

inline void Plane::format(nb::bytes fabric_id, nb::bytes digest,
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

inline nb::object Plane::refusal(nb::bytes fabric_id, nb::bytes digest) const {
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

}  // namespace fomoe
