// One ring of a fabric, seen from its producer or its consumer.
#pragma once

#include <cstring>
#include <string>

#include "plane.h"

namespace fomoe {

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
        uint8_t* slot = reserve();
        if (slot == nullptr) return false;
        std::memcpy(slot, data.data(), data.size());
        publish(tag, uint32_t(data.size()));
        return true;
    }

    // Room for the next message's payload, which only publish() makes visible; null when full.
    // `known_tail_` spares the consumer's cache line while the ring is known to have room.
    uint8_t* reserve() {
        const uint64_t head = load_relaxed(&h_->head);
        if (head - known_tail_ >= slots_) known_tail_ = load_acquire(&h_->tail);
        if (head - known_tail_ >= slots_) return nullptr;
        return reinterpret_cast<uint8_t*>(slot_at(head) + 1);
    }

    void publish(uint32_t tag, uint32_t nbytes) {
        const uint64_t head = load_relaxed(&h_->head);
        SlotHeader* slot = slot_at(head);
        slot->position = head;
        slot->tag = tag;
        slot->nbytes = nbytes;
        store_release(&h_->head, head + 1);
        plane_.ring(to_);
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

}  // namespace fomoe
