"""An exhaustive explorer of interleavings, and the channel's protocol as programs for it.

A program gives an atomic step `step(shared, local) -> next label | Park` for a label. The explorer
runs every thread in every reachable state. Sleeps have no timeout here, so a lost wake-up is a
state in which nothing can run. Labels are those of layout.h.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Park:
    """FUTEX_WAIT: sleeps on `word` if it still has the value `seen`, then goes on at `then`."""

    word: str
    seen: int
    then: str


DONE = "done"
KILLED = "killed"


def explore(programs, shared, killable=frozenset()):
    """Returns (number of states, a deadlocked state or None); steps assert what must hold."""
    first = (tuple(shared.items()), tuple(("begin", (), None) for _ in programs))
    seen, stack, stuck = {first}, [first], None
    while stack:
        state = stack.pop()
        successors = list(_successors(programs, state, killable))
        if not successors and any(t[0] not in (DONE, KILLED) for t in state[1]):
            stuck = stuck or state
        for nxt in successors:
            if nxt not in seen:
                seen.add(nxt)
                stack.append(nxt)
    return len(seen), stuck


def _successors(programs, state, killable):
    frozen, threads = state
    for i, (label, local, parked) in enumerate(threads):
        if label in (DONE, KILLED):
            continue
        if i in killable:
            yield frozen, _replaced(threads, i, (KILLED, (), None))
        if parked is not None:
            continue
        shared, mine = dict(frozen), dict(local)
        shared["killed"] = any(t[0] == KILLED for t in threads)
        target = programs[i].step(label)(shared, mine)
        if target is None:  # not enabled
            continue
        del shared["killed"]
        woken = shared.pop("wake", None)
        after = threads
        if woken is not None:
            after = tuple(t if t[2] != woken else (t[0], t[1], None) for t in after)
        if isinstance(target, Park):
            asleep = shared[target.word] == target.seen
            me = (target.then, tuple(mine.items()), target.word if asleep else None)
        else:
            me = (target, tuple(mine.items()), None)
        yield tuple(shared.items()), _replaced(after, i, me)


def _replaced(threads, i, thread):
    return (*threads[:i], thread, *threads[i + 1 :])


def shared_state(rings):
    state = {"bell": 0, "sleepers": 0, "dead": 0}
    for r in range(rings):
        state |= {f"head{r}": 0, f"tail{r}": 0, f"space{r}": 0, f"psleep{r}": 0, f"slot{r}": ()}
    return state


class Program:
    """A thread: every public method is an atomic step, named by its label in lower case."""

    fault = None

    def step(self, label):
        return getattr(self, label.lower())


class Producer(Program):
    """Publishes 0, 1, ... `messages` - 1 into ring `r`, sleeping while it is full."""

    def __init__(self, r, messages, slots, fault=None):
        self.r, self.messages, self.slots, self.fault = r, messages, slots, fault
        self.head, self.tail = f"head{r}", f"tail{r}"
        self.space, self.psleep, self.slot = f"space{r}", f"psleep{r}", f"slot{r}"

    def _full(self, s):
        return s[self.head] - s[self.tail] >= self.slots

    def begin(self, s, m):
        if s[self.head] == self.messages or s["dead"]:
            return DONE
        return "S1" if self._full(s) else "P0"

    def s1(self, s, m):
        m["seen"] = s[self.space]
        return "S2"

    def s2(self, s, m):
        s[self.psleep] += 1
        return "S3"

    def s3(self, s, m):
        return "S4" if self._full(s) and not s["dead"] else "S5"

    def s4(self, s, m):
        return Park(self.space, m["seen"], "S5")

    def s5(self, s, m):
        s[self.psleep] -= 1
        m.clear()
        return "begin"

    def p0(self, s, m):
        # A slot that is filled before it was given back would make this longer than the ring.
        s[self.slot] = (*s[self.slot], s[self.head])
        assert len(s[self.slot]) <= self.slots
        return {"ring_first": "P2", "look_first": "P3"}.get(self.fault, "P1")

    def p1(self, s, m):
        s[self.head] += 1
        return "begin" if self.fault == "ring_first" else "P2"

    def p2(self, s, m):
        s["bell"] += 1
        if self.fault == "look_first":
            return "P4" if m.pop("wake") else "begin"
        return "P3"

    def p3(self, s, m):
        if self.fault == "look_first":
            m["wake"] = s["sleepers"] > 0
            return "P1"
        if not s["sleepers"]:
            return "P1" if self.fault == "ring_first" else "begin"
        return "clear" if self.fault == "ringer_clears" else "P4"

    def clear(self, s, m):
        s["sleepers"] = 0
        return "P4"

    def p4(self, s, m):
        s["wake"] = "bell"
        return "P1" if self.fault == "ring_first" else "begin"


class Consumer(Program):
    """Takes everything from all rings in order, sleeping on the bell while there is nothing."""

    def __init__(self, rings, messages, fault=None):
        self.rings, self.messages, self.fault = rings, messages, fault

    def begin(self, s, m):
        m["r"] = 0
        if all(m.get(f"end{r}") or s[f"tail{r}"] == self.messages for r in range(self.rings)):
            return DONE
        return "scan" if self.fault == "scan_first" else "W1"

    def w1(self, s, m):
        m["seen"] = s["bell"]
        return "W3" if self.fault == "scan_first" else "scan"

    def scan(self, s, m):
        r = m["r"]
        if s[f"head{r}"] != s[f"tail{r}"]:
            m.pop("gone", None)
            return "C0"
        if s["dead"] and not m.get(f"end{r}"):
            if not m.get("gone"):
                m["gone"] = True
                return "scan"  # looked at again after the death was seen
            del m["gone"]
            m[f"end{r}"] = True
            return "begin"
        if r + 1 < self.rings:
            m["r"] = r + 1
            return "scan"
        return "W1" if self.fault == "scan_first" else "W3"

    def c0(self, s, m):
        assert s[f"slot{m['r']}"][0] == s[f"tail{m['r']}"], "out of order or torn"
        m.pop("seen", None)
        return "C2" if self.fault == "look_before_consume" else "C1"

    def c1(self, s, m):
        s[f"tail{m['r']}"] += 1
        s[f"slot{m['r']}"] = s[f"slot{m['r']}"][1:]
        if self.fault == "look_before_consume":
            return "C3" if m.pop("wake") else "begin"
        return "C2"

    def c2(self, s, m):
        sleeping = s[f"psleep{m['r']}"] > 0
        if self.fault == "look_before_consume":
            m["wake"] = sleeping
            return "C1"
        waking = "C4" if self.fault == "space_not_bumped" else "C3"
        return waking if sleeping else "begin"

    def c3(self, s, m):
        s[f"space{m['r']}"] += 1
        return "C4"

    def c4(self, s, m):
        s["wake"] = f"space{m['r']}"
        return "begin"

    def w3(self, s, m):
        s["sleepers"] = 1 if self.fault == "ringer_clears" else s["sleepers"] + 1
        return "W4"

    def w4(self, s, m):
        return "W5" if s["bell"] == m["seen"] else "W6"

    def w5(self, s, m):
        return Park("bell", m["seen"], "begin" if self.fault == "ringer_clears" else "W6")

    def w6(self, s, m):
        s["sleepers"] = 0 if self.fault == "ringer_clears" else s["sleepers"] - 1
        del m["seen"]
        return "begin"


class Watcher(Program):
    """Notices that a process was killed, then bumps and wakes every word; does not look back."""

    def __init__(self, rings, messages):
        self.words = [("bell", "sleepers"), *((f"space{r}", f"psleep{r}") for r in range(rings))]
        self.wanted = [(f"tail{r}", messages) for r in range(rings)]

    def begin(self, s, m):
        if s["killed"]:
            s["dead"] = 1
            m["i"] = 0
            return "bump"
        # With all delivered it is not a deadlock that nobody dies.
        return DONE if all(s[tail] == n for tail, n in self.wanted) else None

    def bump(self, s, m):
        s[self.words[m["i"]][0]] += 1
        return "look"

    def look(self, s, m):
        return "wake" if s[self.words[m["i"]][1]] else self._next(m)

    def wake(self, s, m):
        s["wake"] = self.words[m["i"]][0]
        return self._next(m)

    def _next(self, m):
        m["i"] += 1
        return "bump" if m["i"] < len(self.words) else DONE
