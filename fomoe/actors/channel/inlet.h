// The receiving end of a socket to a peer on another box: frames in, arenas and ring out.
//
// It runs without the interpreter's lock, so that messages arrive while Python computes. wire.py
// describes the frames. Everything that comes in is checked against the layout before it is used;
// whatever does not fit ends the connection.
#pragma once

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include <poll.h>
#include <sys/socket.h>

#include "ring.h"

namespace fomoe {

constexpr uint32_t kWireMagic = 0x656F6D66;  // "fmoe"
constexpr uint32_t kMaxRegions = 64;
enum Kind : uint8_t { kPulse = 0, kMessage = 1, kBell = 2, kKinds = 3 };

struct WireHeader {
    uint32_t magic;
    uint8_t kind;
    uint8_t unused;
    uint16_t regions;
    uint32_t tag;
    uint32_t payload_bytes;
    uint64_t position;
    uint64_t consumed;
    uint8_t padding[32];
};
static_assert(sizeof(WireHeader) == 64 && offsetof(WireHeader, position) == 16, "wire");

struct WireRegion {
    uint32_t arena;
    uint32_t unused;
    uint64_t offset;
    uint64_t nbytes;
};
static_assert(sizeof(WireRegion) == 24, "wire");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little endian");

class Inlet {
  public:
    // `ring` may be null: a peer that has no ring to this process sends no messages.
    Inlet(Plane& plane, Ring* ring, uint32_t me, int fd)
        : plane_(plane), ring_(ring), me_(me), fd_(fd), last_read_(now_ns()) {
        plane.member(me);
        table_.resize(kMaxRegions);
        expect(Stage::header, &header_, sizeof header_);
    }

    // Delivers what comes in for `slice_ms`; false when the peer closed the stream, ChannelError
    // when the stream broke or holds what it must not.
    bool pump(double slice_ms) {
        std::string end;
        {
            nb::gil_scoped_release release;
            end = run(now_ns() + milliseconds(slice_ms));
        }
        if (!end.empty()) raise_channel_error(end);
        return !closed_;
    }

    // Seconds since the last byte; for the thread that pumps.
    double quiet_s() const { return double(now_ns() - last_read_) * 1e-9; }

    // The sending thread counts a message before it writes it, so that no answer can overtake.
    uint64_t count_sent() { return __atomic_fetch_add(&sent_, 1, __ATOMIC_SEQ_CST); }
    uint64_t sent() const { return load_acquire(&sent_); }
    uint64_t in_flight() const { return load_acquire(&sent_) - load_acquire(&acked_); }

    // Sleeps at most once, till fewer than `slots` messages are unconsumed by the peer.
    void wait_credit(uint64_t slots, double timeout_ms) {
        auto ready = [=] { return load_ordered(&sent_) - load_ordered(&acked_) < slots; };
        const uint32_t seen = load_acquire(&credit_);
        if (ready()) return;
        nb::gil_scoped_release release;
        sleep_once(&credit_, seen, &credit_sleepers_, ready, milliseconds(timeout_ms));
    }

    void wake() { bump(&credit_, &credit_sleepers_); }

  private:
    enum class Stage { header, table, payload, region };

    std::string run(uint64_t deadline) {
        for (;;) {
            const ssize_t got = recv(fd_, at_, left_, MSG_DONTWAIT);
            const uint64_t now = now_ns();
            if (got > 0) {
                at_ += got;
                left_ -= size_t(got);
                last_read_ = now;
            } else if (got == 0) {
                if (stage_ != Stage::header || left_ != sizeof header_) return "it broke off";
                closed_ = true;
                return "";
            } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
                pollfd wanted{fd_, POLLIN, 0};
                if (now < deadline) poll(&wanted, 1, int((deadline - now) / 1'000'000) + 1);
            } else if (errno != EINTR) {
                return std::strerror(errno);
            }
            while (left_ == 0) {
                std::string wrong = advance();
                if (!wrong.empty()) return wrong;
            }
            if (now >= deadline) return "";
        }
    }

    void expect(Stage stage, void* at, size_t nbytes) {
        stage_ = stage;
        at_ = static_cast<uint8_t*>(at);
        left_ = nbytes;
    }

    // The expected part is there: checks it and says where the next one goes.
    std::string advance() {
        switch (stage_) {
        case Stage::header:
            return take_header();
        case Stage::table:
            return take_table();
        case Stage::payload:
            next_region_ = 0;
            break;
        case Stage::region:
            break;
        }
        if (next_region_ < header_.regions) {
            const WireRegion& r = table_[next_region_++];
            expect(Stage::region, plane_.arena(r.arena) + r.offset, r.nbytes);
            return "";
        }
        ring_->publish(header_.tag, header_.payload_bytes);
        ++received_;
        expect(Stage::header, &header_, sizeof header_);
        return "";
    }

    std::string take_header() {
        const WireHeader& h = header_;
        if (h.magic != kWireMagic || h.kind >= kKinds) return "it sent something that is no frame";
        if (h.payload_bytes > plane_.layout().slot_bytes || h.regions > kMaxRegions ||
            (h.kind != kMessage && (h.payload_bytes != 0 || h.regions != 0)))
            return "it sent a frame out of bounds: payload of " + std::to_string(h.payload_bytes) +
                   " bytes, " + std::to_string(h.regions) + " regions";
        if (h.consumed < acked_ || h.consumed > sent())
            return "it says it consumed " + std::to_string(h.consumed) + " of " +
                   std::to_string(sent()) + " messages";
        if (h.consumed != acked_) {
            store_ordered(&acked_, h.consumed);
            wake();
        }
        if (h.kind == kMessage) return begin_message();
        if (h.kind == kBell) plane_.ring(me_);
        expect(Stage::header, &header_, sizeof header_);
        return "";
    }

    std::string begin_message() {
        if (ring_ == nullptr || header_.position != received_)
            return "its message " + std::to_string(header_.position) + " was not expected";
        slot_ = ring_->reserve();
        if (slot_ == nullptr) return "it sent more messages than the ring has slots";
        expect(Stage::table, table_.data(), header_.regions * sizeof(WireRegion));
        return "";
    }

    std::string take_table() {
        const auto& sizes = plane_.layout().arena_bytes;
        for (uint32_t i = 0; i < header_.regions; ++i) {
            const WireRegion& r = table_[i];
            if (r.arena >= sizes.size() || r.nbytes > sizes[r.arena] ||
                r.offset > sizes[r.arena] - r.nbytes)
                return "it sent a region outside of an arena";
        }
        expect(Stage::payload, slot_, header_.payload_bytes);
        return "";
    }

    Plane& plane_;
    Ring* ring_;
    uint32_t me_;
    int fd_;
    Stage stage_ = Stage::header;
    uint8_t* at_ = nullptr;
    size_t left_ = 0;
    WireHeader header_{};
    std::vector<WireRegion> table_;
    uint32_t next_region_ = 0;
    uint8_t* slot_ = nullptr;
    uint64_t received_ = 0;
    bool closed_ = false;
    uint64_t last_read_;
    uint64_t sent_ = 0, acked_ = 0;  // my messages; of those, consumed by the peer
    uint32_t credit_ = 0, credit_sleepers_ = 0;
};

}  // namespace fomoe
