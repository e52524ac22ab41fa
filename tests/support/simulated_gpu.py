"""Storage and GPUs that move tags instead of bytes, in any order that their contracts allow.

`fomoe.engine.copies` is the contract. A slot's content is the (layer, expert) whose bytes it has,
None while somebody writes to it. Readers check what they find, when they begin and when they end.
"""

from collections import deque

import numpy as np

from fomoe.engine.copies import COPY, CopyKind, Outcome


class Memory:
    """A node's segment: content and landed word of each slot."""

    def __init__(self, n_slots):
        self.content = [None] * n_slots
        self.word = [0] * n_slots


class Storage:
    """Reads into slots: per slot as asked, else in any order; idle ones can be dropped."""

    def __init__(self, memory, demand):
        self.memory, self.demand = memory, demand
        self.queue = []  # [slot, generation, key, priority, begun]
        self.failing = set()  # keys whose next read fails

    def ask(self, records):
        """Take READ records; returns the (layer, expert, slot, generation) that they displace."""
        dropped = []
        for r in records:
            slot, generation, key = int(r["slot"]), int(r["generation"]), (r["layer"], r["expert"])
            key, priority = (int(key[0]), int(key[1])), int(r["priority"])
            if self.memory.word[slot] >= generation:
                continue
            same = [job for job in self.queue if job[:2] == [slot, generation]]
            if same:
                same[0][3] = min(same[0][3], priority)
                continue
            for job in [j for j in self.queue if j[0] == slot and not j[4] and j[3] != self.demand]:
                self.queue.remove(job)
                dropped.append((*job[2], slot, job[1]))
            self.queue.append([slot, generation, key, priority, False])
        return dropped

    def drop(self, layer):
        gone = [j for j in self.queue if j[2][0] == layer and j[3] != self.demand and not j[4]]
        self.queue = [job for job in self.queue if job not in gone]
        return [(*job[2], *job[:2]) for job in gone]

    def actions(self):
        """What could happen next: callables that return a failed read and whether it was idle."""
        first = {}
        for job in self.queue:
            first.setdefault(job[0], job)
        return [lambda job=job: self._advance(job) for job in first.values()]

    def _advance(self, job):
        slot, generation, key, priority, begun = job
        if not begun:
            job[4] = True
            self.memory.content[slot] = None
            return None
        self.queue.remove(job)
        if key in self.failing:
            self.failing.discard(key)
            return (*key, slot, generation), priority != self.demand
        self.memory.content[slot] = key
        self.memory.word[slot] = generation
        return None


class _Copy:
    """A record at work."""

    def __init__(self, record, step):
        self.record = record.copy()
        self.kind, self.step = int(record["kind"]), step
        self.key = int(record["layer"]), int(record["expert"])
        self.vram, self.slot = int(record["vram"]), int(record["slot"])
        self.generation = int(record["generation"])
        self.begun = self.ended = False
        self.before = None  # the copy on the same VRAM slot that must end first
        self.same = None  # the copy that does this one's work


class Gpu:
    """One device: VRAM slots by (class, slot), copies under way, the step under way."""

    def __init__(self, memory, class_of):
        self.memory, self.class_of = memory, class_of
        self.content = {}
        self.copies = []  # not ended
        self.last = {}  # the last copy on each VRAM slot
        self.answers = []  # ahead records with their outcome
        self.steps = deque()  # waves, in order

    def _at(self, copy):
        return self.class_of(copy.key[0]), copy.vram

    def order(self, records, step=None):
        """Take the records of a step, or those of an ahead list; returns them as copies."""
        taken = []
        for record in records:
            if record["kind"] == CopyKind.CANCEL:
                for copy in list(self.copies):
                    named = copy.slot, copy.generation
                    if named == (record["slot"], record["generation"]) and copy.step is None:
                        self._drop(copy)
                continue
            copy = _Copy(record, step)
            at = self._at(copy)
            before = self.last.get(at)
            if before is not None and copy.kind == CopyKind.LOAD == before.kind:
                is_same = (before.slot, before.generation) == (copy.slot, copy.generation)
                if is_same and before.begun:
                    copy.same = before
                elif not before.begun:
                    self._drop(before)
            copy.before = self.last.get(at)
            self.last[at] = copy
            self.copies.append(copy)
            taken.append(copy)
        return taken

    def _drop(self, copy):
        if copy.begun or copy.ended or copy.kind == CopyKind.DEMOTE:
            return
        assert copy.step is None, "a load of a step was replaced"
        self._unlink(copy)
        self._answer(copy, Outcome.DROPPED)

    def _unlink(self, copy):
        copy.ended = True
        self.copies.remove(copy)
        if self.last.get(self._at(copy)) is copy:
            self.last[self._at(copy)] = copy.before

    def _answer(self, copy, outcome):
        if copy.step is None:
            copy.record["outcome"] = outcome
            self.answers.append(copy.record)

    def start(self, step_id, layer, entries, records, *, adds):
        """Begin a wave: `entries` computed as their bytes come, `adds` in their order."""
        self.steps.append(_Step(step_id, layer, entries, self.order(records, step_id), adds))

    def abort(self, step_id):
        """Give a step's waves up: loads that have not begun never will."""
        for step in self.steps:
            if step.id == step_id:
                step.aborted = True
                for copy in step.copies:
                    never = not (copy.begun or copy.ended or copy.same)
                    if copy.kind == CopyKind.LOAD and never:
                        self._unlink(copy)

    def take_answers(self):
        answers, self.answers = self.answers, []
        return np.array(answers, COPY)

    def actions(self):
        moves = [lambda copy=copy: self._advance(copy) for copy in self.copies if self._may(copy)]
        if self.steps:
            step = self.steps[0]
            moves += [lambda at=at: self._compute(step, at) for at in self._ready(step)]
        return moves

    def _may(self, copy):
        if copy.same is not None:
            return copy.same.ended
        if copy.begun:
            return True
        if copy.before is not None and not copy.before.ended:
            return False
        return copy.kind == CopyKind.DEMOTE or self.memory.word[copy.slot] >= copy.generation

    def _advance(self, copy):
        source, target = self._ends(copy)
        if copy.same is None:
            assert source() == copy.key, (copy.record, source())
            if not copy.begun:
                copy.begun = True
                target(None)
                return
            target(copy.key)
            if copy.kind == CopyKind.DEMOTE:
                self.memory.word[copy.slot] = copy.generation
        copy.begun = copy.ended = True
        self.copies.remove(copy)
        self._answer(copy, Outcome.DONE)

    def _ends(self, copy):
        segment = (
            lambda: self.memory.content[copy.slot],
            lambda tag: self.memory.content.__setitem__(copy.slot, tag),
        )
        vram = (
            lambda: self.content.get(self._at(copy)),
            lambda tag: self.content.__setitem__(self._at(copy), tag),
        )
        return (segment[0], vram[1]) if copy.kind == CopyKind.LOAD else (vram[0], segment[1])

    def _ready(self, step):
        if step.aborted:
            return []
        left = [at for at in range(len(step.entries)) if at not in step.computed]
        if step.adds:
            left = left[:1]  # ascending, whatever comes first
        return [at for at in left if self._is_there(step, step.entries[at])]

    def _is_there(self, step, entry):
        if entry["slot"] < 0:
            return self.memory.word[~entry["slot"]] >= entry["generation"]
        if not entry["generation"]:
            return True
        mine = [c for c in step.copies if c.kind == CopyKind.LOAD and c.vram == entry["slot"]]
        assert len(mine) == 1, "an entry waits for one load of its step"
        return mine[0].ended

    def _compute(self, step, at):
        self._check(step, step.entries[at])
        step.computed.append(at)

    def _check(self, step, entry):
        key = step.layer, int(entry["expert"])
        if entry["slot"] < 0:
            assert self.memory.content[~entry["slot"]] == key
        else:
            found = self.content.get((self.class_of(step.layer), int(entry["slot"])))
            assert found == key, (key, found)

    def done(self):
        """Return (id, aborted, experts in the order that they were computed) of an ended wave."""
        if not self.steps:
            return None
        step = self.steps[0]
        if not all(copy.ended for copy in step.copies):
            return None
        if not step.aborted and len(step.computed) < len(step.entries):
            return None
        if not step.aborted:
            for entry in step.entries:
                self._check(step, entry)  # nobody touched what was being read
        self.steps.popleft()
        return step.id, step.aborted, [int(step.entries[at]["expert"]) for at in step.computed]


class _Step:
    """A wave: its entries and how many are computed."""

    def __init__(self, step_id, layer, entries, copies, adds):
        self.id, self.layer, self.entries, self.copies = step_id, layer, entries.copy(), copies
        self.adds, self.computed, self.aborted = adds, [], False
