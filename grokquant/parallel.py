"""Several processes that make one result together. The only file that knows ranks.

torchrun starts the processes, and torch.distributed carries what they give each other: by gloo, or
by NCCL where each has a GPU. A `Team` is a process among the others, its members, which have
numbers. All members call the same methods in the same order. A process that is alone is a team of
one: for it every method is the identity.

Nothing is ever added up across members, so that no sum depends on their number: rows, matrices and
records are sent from the member that has them to those that need them, in the order of members.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from grokquant.errors import Elsewhere, InputError, said_by

if TYPE_CHECKING:  # importing torch takes seconds, and the command line imports this file
    import torch
    from torch import Tensor
    from torch.distributed import Store

    from grokquant.types import Guide, Routed

T = TypeVar("T")
# {name: (dtype, shape)} of tensors that a receiver makes room for.
Layout = Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]
# Takes the outputs of some of the rows that were handed to a task.
Take = Callable[[slice, "Tensor"], None]
# What the members that have the rows of a task say to something about each.
Ask = Callable[["Tensor"], "Tensor"]

# What a member sends at once to all others: large enough for full speed, small enough to copy.
AT_ONCE = 1 << 28
# Seconds between two signs of life of a member.
_BEAT = 5.0
# Seconds without one after which a member counts as lost: swapping or a slow store delays some.
_SILENCE = 60.0
# How long members wait for one that lives but does not come. An expert takes minutes, on a slow CPU
# half an hour, and one member may have one more than others.
_PATIENCE = timedelta(hours=6)
# How long members wait for all to begin.
_START = timedelta(minutes=10)
# Seconds that the first member is given to say an error that all of them have, and seconds in which
# the store answers if it ever does.
_FIRST_WORD = 1.0
_ANSWER = 3.0


@dataclass
class Traffic:
    """What a member has sent to others, and the seconds in which it sent, received or waited."""

    sent_bytes: int = 0
    seconds: float = 0.0


class Team:
    """A process that works alone, and what it would do with others."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    @property
    def is_divided(self) -> bool:
        """Whether there are others."""
        return False

    def assign(self, costs: Sequence[float]) -> list[int]:
        """The member for each task, so that sums of `costs` are nearly equal."""
        return [0] * len(costs)

    def is_here(self, member: int) -> bool:
        """Whether this process is that member."""
        return True

    def rows(self, count: int, piece: int, least: int = 0) -> slice:
        """Of `count` rows those of this process: whole pieces of `piece` rows, in order. The first
        member has `least` rows or more."""
        return slice(0, count)

    def only_first(self, own: T, others: T) -> T:
        """`own` on the first member, `others` on all others."""
        return own

    def once(self, action: Callable[[], T]) -> T:
        """The result of `action`, a JSON value, which only the first member performs.

        Raises what it raises there, and Elsewhere on all other members.
        """
        return action()

    def merge(self, values: dict[str, Any]) -> dict[str, Any]:
        """The dictionaries of all members in one, values of JSON, in the order of members."""
        return values

    def agree(self, known: dict, difference: Callable[[dict, dict], str | None]) -> None:
        """Raises InputError, which names the member, unless all of them know the same.

        `difference` says how what a member knows differs from what the first one does.
        """

    def total(self, counts: "Tensor") -> "Tensor":
        """The sum of integers [n] of all members."""
        return counts

    def joined(self, rows: "Tensor") -> "Tensor":
        """The rows [n, ...] of all members, in order, on all of them."""
        return rows

    def gather(self, rows: "Tensor", members: Collection[int]) -> "Tensor | None":
        """The rows [n, ...] of all members, in order, on `members` only; None on all others."""
        return rows

    def of_all(self, rows: "Tensor", work: "Callable[[Tensor], Tensor]") -> "Tensor":
        """What `work` makes of the rows [n, ...] of all members, in order: the part for `rows`."""
        return work(rows)

    def shared(
        self,
        value: T | None,
        pack: "Callable[[T], Mapping[str, Tensor]]",
        unpack: "Callable[[dict[str, Tensor]], T]",
        layout: Layout,
        member: int,
    ) -> T:
        """The value that `member` has, on all members; it travels packed."""
        assert value is not None
        return value

    def hand_over(
        self, tensors: "Mapping[str, Tensor] | None", layout: Layout, giver: int, taker: int
    ) -> "dict[str, Tensor]":
        """The tensors of `giver`, on `taker`; none on all others."""
        return dict(tensors or {})

    def at_owners(
        self,
        given: "Sequence[Routed]",
        owners: Sequence[int],
        add: Callable[[int, slice, "Tensor"], None],
    ) -> "Iterator[tuple[int, Routed, Take]]":
        """Hands the rows of each task to its owner, and their outputs back.

        `given` are the rows of this process for each task. Yields, task by task, those that this
        process owns, with the rows of all members in order, and takes their outputs. When the
        caller has done all, `add` gets the task and outputs for parts of the given rows, task by
        task. Alone, each output is added as it comes.
        """
        for task, routed in enumerate(given):
            yield task, routed, partial(add, task)

    def in_turn(
        self,
        given: "Sequence[Routed]",
        owners: Sequence[int],
        answer: Callable[[int, "Tensor"], "Tensor"],
        add: Callable[[int, slice, "Tensor"], None],
    ) -> "Iterator[tuple[int, Routed, Take, Ask]]":
        """The same for tasks that need what those before them have given.

        The owner of a task begins it beside others, and asks once, with something about each of its
        rows; that waits until the outputs of all tasks before are added. Whoever has some of the
        rows gives `answer` the task and their part, and the owner gets all answers.
        """
        for task, routed in enumerate(given):
            yield task, routed, partial(add, task), partial(answer, task)

    def say(self, error: str, say: Callable[[str], None]) -> None:
        """Gives `say` an error, unless another member has said what is wrong."""
        say(error)

    def leave(self) -> None:
        """Ends the work in common."""


ALONE = Team()


class Divided(Team):
    """Member `rank` of `size`, as far as that takes no exchange: it knows who does what."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank = rank
        self.size = size

    @property
    def is_divided(self) -> bool:
        return self.size > 1

    def assign(self, costs: Sequence[float]) -> list[int]:
        members = [0] * len(costs)
        loads = [0.0] * self.size
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            least = loads.index(min(loads))
            members[task] = least
            loads[least] += costs[task]
        return members

    def is_here(self, member: int) -> bool:
        return member == self.rank

    def rows(self, count: int, piece: int, least: int = 0) -> slice:
        pieces = -(-count // piece)
        least = -(-least // piece)
        first = max(pieces * self.rank // self.size, least * bool(self.rank))
        last = max(pieces * (self.rank + 1) // self.size, least)
        return slice(min(first * piece, count), min(last * piece, count))

    def only_first(self, own: T, others: T) -> T:
        return others if self.rank else own


def supposed(size: int) -> Team:
    """A team that only divides work, for plans."""
    return Divided(0, size)


class Members(Divided):
    """Member `rank` of `size`, which find each other through `store`.

    What they exchange passes `device`: a GPU of its own, or main memory. `lost` is called with a
    line about a member that gives no sign of life, from another thread.
    """

    def __init__(
        self,
        store: "Store",
        rank: int,
        size: int,
        device: "torch.device | None" = None,
        lost: "Callable[[Members, str], None] | None" = None,
    ) -> None:
        import torch
        from torch.distributed import PrefixStore, ProcessGroupGloo

        super().__init__(rank, size)
        self._store = store
        self._device = device or torch.device("cpu")
        self._names = _names_of_all(store, rank, size)
        self._watch = _Watch(self._names, rank)
        if lost is not None:  # now, since one may be lost before all are connected
            connection = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            self._watch.begin(connection, partial(lost, self))
        with self._waiting():
            gloo: Any = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, _PATIENCE)
            gloo.barrier().wait()  # nobody leaves before all are connected
        self._control = gloo  # numbers, which are in main memory
        self._bulk: Any = gloo
        if self._device.type == "cuda":
            self._bulk = _nccl(PrefixStore("nccl", store), rank, size)

    def once(self, action: Callable[[], T]) -> T:
        said: dict[str, Any] = {}
        error: BaseException | None = None
        if self.rank == 0:
            try:
                said["result"] = action()
            except BaseException as raised:  # signals included: the others wait for it
                error = raised
        said = self.merge(said)
        if error:
            raise error
        if "result" not in said:
            raise Elsewhere(f"{self._names[0]} has failed")
        return said["result"]

    def merge(self, values: dict[str, Any]) -> dict[str, Any]:
        everything: dict[str, Any] = {}
        for each in self._everyones(values):
            everything |= each
        return everything

    def agree(self, known: dict, difference: Callable[[dict, dict], str | None]) -> None:
        first, *others = self._everyones(known)
        for member, other in enumerate(others, 1):
            if found := difference(first, other):
                raise InputError(f"{self._names[member]} differs from {self._names[0]}: {found}")

    def total(self, counts: "Tensor") -> "Tensor":
        everyones, _ = self._exchange([counts] * self.size)
        return everyones.view(self.size, -1).sum(0)

    def joined(self, rows: "Tensor") -> "Tensor":
        return self._exchange([rows] * self.size)[0]

    def gather(self, rows: "Tensor", members: Collection[int]) -> "Tensor | None":
        if not members:
            return None
        everyones, _ = self._exchange([rows[: len(rows) * (m in members)] for m in self._all])
        return everyones if self.rank in members else None

    def of_all(self, rows: "Tensor", work: "Callable[[Tensor], Tensor]") -> "Tensor":
        everyones, counts = self._exchange([rows] * self.size)
        return work(everyones).split(counts)[self.rank]

    def dealt(self, rows: "Tensor | None", counts: Sequence[int], like: "Tensor") -> "Tensor":
        """Of the rows of the one member that has some, `counts[m]` for each member m: its own."""
        nothing = [like[:0]] * self.size
        return self._exchange(nothing if rows is None else list(rows.split(list(counts))))[0]

    def shared(
        self,
        value: T | None,
        pack: "Callable[[T], Mapping[str, Tensor]]",
        unpack: "Callable[[dict[str, Tensor]], T]",
        layout: Layout,
        member: int,
    ) -> T:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = member
        options.rootTensor = 0
        room = self._room(None if value is None else pack(value), layout)
        for tensor in room.values():
            for part in _bytes_of(tensor).split(AT_ONCE):
                here = part.to(self._device)
                with self._waiting(len(part) * (self.size - 1) * self.is_here(member)):
                    self._bulk.broadcast([here], options).wait()
                part.copy_(here)
        return unpack(room) if value is None else value

    def hand_over(
        self, tensors: "Mapping[str, Tensor] | None", layout: Layout, giver: int, taker: int
    ) -> "dict[str, Tensor]":
        if giver == taker or self.rank not in (giver, taker):
            return dict(tensors or {}) if self.rank == taker else {}
        handed = self._room(tensors, layout)
        for tensor in handed.values():
            for part in _bytes_of(tensor).split(AT_ONCE):
                here = part.to(self._device)
                if self.rank == giver:
                    with self._waiting(len(part)):
                        self._bulk.send([here], taker, 0).wait()
                    continue
                with self._waiting():
                    self._bulk.recv([here], giver, 0).wait()
                part.copy_(here)
        return handed if self.rank == taker else {}

    def at_owners(
        self,
        given: "Sequence[Routed]",
        owners: Sequence[int],
        add: Callable[[int, slice, "Tensor"], None],
    ) -> "Iterator[tuple[int, Routed, Take]]":
        import torch

        tasks_of = self._tasks_of(owners)
        counts = self._counts([len(routed.token) for routed in given])
        at_home = self._brought(given, tasks_of, counts)
        sent_by = counts[:, tasks_of[self.rank]].sum(1).tolist()
        outputs = torch.empty(sum(sent_by), *given[0].x.shape[1:], dtype=given[0].x.dtype)
        for task, routed in at_home:
            yield task, routed, partial(_put, outputs, routed.token)
        returned, _ = self._exchange(list(outputs.split(sent_by)))
        order = [task for tasks in tasks_of for task in tasks]
        by_task = returned.split([len(given[task].token) for task in order])
        for task, y in sorted(zip(order, by_task, strict=True), key=lambda pair: pair[0]):
            add(task, slice(0, len(y)), y)

    def in_turn(
        self,
        given: "Sequence[Routed]",
        owners: Sequence[int],
        answer: Callable[[int, "Tensor"], "Tensor"],
        add: Callable[[int, slice, "Tensor"], None],
    ) -> "Iterator[tuple[int, Routed, Take, Ask]]":
        import torch

        counts = self._counts([len(routed.token) for routed in given])  # [members, tasks]
        like = given[0].x[:0]
        turns = _Turns(self, owners, counts, like, answer, add)
        first = _first_of_round(owners)
        for task, routed in self._brought(given, self._tasks_of(owners), counts):
            turns.end(first[task])
            outputs = torch.empty(len(routed.token), *like.shape[1:], dtype=like.dtype)
            yield task, routed, partial(_fill, outputs), partial(turns.ask, task)
            turns.finish(task, outputs)
        turns.end(len(owners))

    def _tasks_of(self, owners: Sequence[int]) -> list[list[int]]:
        """The tasks of each member."""
        return [[task for task, owner in enumerate(owners) if owner == m] for m in self._all]

    def _brought(
        self, given: "Sequence[Routed]", tasks_of: list[list[int]], counts: "Tensor"
    ) -> "list[tuple[int, Routed]]":
        """The tasks of this process, with the rows of all members; `counts` [members, tasks]."""
        own = tasks_of[self.rank]

        def bring(rows_of: "Callable[[Routed], Tensor]") -> "Tensor":
            return self._exchange([_rows_of(given, tasks, rows_of) for tasks in tasks_of])[0]

        x = bring(lambda routed: routed.x[routed.token])
        guide = _brought_guide(given[0].guide, bring)
        nothing = given[0].gate[:0]
        brought = []
        for task, token in zip(own, _places(counts[:, own]), strict=True):
            routed = replace(given[task], x=x, token=token, gate=nothing, combined=nothing)
            if guide:
                of_task = replace(guide, weight=guide.weight[token], row=guide.row[token])
                routed = replace(routed, guide=of_task)
            brought.append((task, routed))
        return brought

    def say(self, error: str, say: Callable[[str], None]) -> None:
        time.sleep(_FIRST_WORD * bool(self.rank))
        # Without an answer, the store is lost, and whoever kept it may not have spoken.
        spoken = _in_time(lambda: self._store.add("spoken", 1)) or 1
        if spoken == 1:
            say(f"{self._names[self.rank]}: {error}" if self.rank else error)
        if self.rank == 0:  # which may keep the store that the others ask
            _in_time(self._all_have_asked)

    def _all_have_asked(self) -> None:
        while self._store.add("spoken", 0) < self.size:
            time.sleep(0.02)

    def leave(self) -> None:
        self._watch.end()

    @property
    def _all(self) -> range:
        return range(self.size)

    def _everyones(self, value: dict) -> list[dict]:
        """The JSON objects of all members."""
        import torch

        text = bytearray(json.dumps(value).encode())
        data = torch.frombuffer(text, dtype=torch.uint8)
        everything, sizes = self._exchange([data] * self.size)
        return [json.loads(part.numpy().tobytes()) for part in everything.split(sizes)]

    def _counts(self, own: Sequence[int]) -> "Tensor":
        """The integers of each member, which has n of them: int64 [members, n]."""
        import torch

        row = torch.tensor(own, dtype=torch.int64)
        everyones = torch.empty(self.size * len(row), dtype=torch.int64)
        parts = [len(row)] * self.size
        with self._waiting():
            self._control.alltoall_base(everyones, row.repeat(self.size), parts, parts).wait()
        return everyones.view(self.size, -1)

    def _exchange(self, parts: "list[Tensor]") -> "tuple[Tensor, list[int]]":
        """Sends `parts[m]`, rows of one dtype and width, to each member m.

        Returns the rows that came here, in the order of members, and how many each has sent.
        """
        import torch

        like = parts[0]
        width = like.element_size() * prod(like.shape[1:])
        going = [_bytes_of(part) for part in parts]
        sizes = self._counts([len(part) for part in going])  # [from, to]
        coming = sizes[:, self.rank].tolist()
        received = torch.empty(sum(coming), dtype=torch.uint8)
        places = received.split(coming)
        step = max(1, AT_ONCE // self.size)
        for start in range(0, int(sizes.max()), step):
            now = slice(start, start + step)
            room = [len(place[now]) for place in places]
            arrived = self._swap([part[now] for part in going], room)
            for place, part in zip(places, arrived, strict=True):
                place[now] = part
        rows = received.view(like.dtype).view(-1, *like.shape[1:])
        return rows, [size // width for size in coming]

    def _swap(self, parts: "list[Tensor]", coming: list[int]) -> "tuple[Tensor, ...]":
        """The bytes [coming[m]] of each member m for those of `parts[m]`."""
        import torch

        sent = torch.cat(parts).to(self._device)
        arrived = torch.empty(sum(coming), dtype=torch.uint8, device=self._device)
        going = [len(part) for part in parts]
        with self._waiting(len(sent) - going[self.rank]):
            self._bulk.alltoall_base(arrived, sent, coming, going).wait()
        return arrived.cpu().split(coming)

    def _room(self, tensors: "Mapping[str, Tensor] | None", layout: Layout) -> "dict[str, Tensor]":
        """The tensors to send, or room for those to receive."""
        import torch

        if tensors is not None:
            return {name: tensors[name].cpu().contiguous() for name in layout}
        return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}

    @contextmanager
    def _waiting(self, sent_bytes: int = 0) -> Iterator[None]:
        """Counts what is sent and the seconds that it takes. Raises Elsewhere for lost members."""
        begun = time.monotonic()
        self._watch.calls += 1
        try:
            yield
        except RuntimeError as error:
            reason = said_by(error)
            if "timed out" in reason.lower():
                text = f"{self._watch.late()} has not come to an exchange within {_PATIENCE}"
                raise Elsewhere(text) from None
            raise Elsewhere(f"another process of the run has ended ({reason})") from None
        finally:
            self.traffic.sent_bytes += sent_bytes
            self.traffic.seconds += time.monotonic() - begun


class _Turns:
    """Tasks of the `owners`, of which `counts` [members, tasks] rows are at each member, and whose
    outputs are rows like `like`. They end one after the other, on all members.

        owner     begins: asks ---->        goes on: outputs --->
        others                      answer                        add
    """

    def __init__(
        self,
        team: Members,
        owners: Sequence[int],
        counts: "Tensor",
        like: "Tensor",
        answer: Callable[[int, "Tensor"], "Tensor"],
        add: Callable[[int, slice, "Tensor"], None],
    ) -> None:
        self._team = team
        self._owners = owners
        self._counts = counts.T.tolist()
        self._like = like
        self._answer = answer
        self._add = add
        self._ended = 0

    def ask(self, task: int, about: "Tensor | None") -> "Tensor":
        """All answers about the rows of a task, on its owner, once all before it have ended."""
        self.end(task)
        own = self._team.dealt(about, self._counts[task], self._like)
        answers = self._team.gather(self._answer(task, own), {self._owners[task]})
        return self._like if answers is None else answers

    def finish(self, task: int, outputs: "Tensor | None") -> None:
        own = self._team.dealt(outputs, self._counts[task], self._like)
        self._add(task, slice(0, len(own)), own)
        self._ended = task + 1

    def end(self, before: int) -> None:
        """Takes part in all tasks of others before this one."""
        for task in range(self._ended, before):
            self.ask(task, None)
            self.finish(task, None)


class _Watch:
    """Signs of life of all members, which a thread of each writes into the store.

    A sign is the number of signs so far and the number of `calls`: exchanges that the member has
    entered. So a process that stands still is told from one that only does not come.
    """

    def __init__(self, names: Sequence[str], rank: int) -> None:
        self.calls = 0
        self._names = names
        self._rank = rank
        self._others = [member for member in range(len(names)) if member != rank]
        self._signs: dict[int, str] = {}
        self._answers = 0  # of the store
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, store: "Store", lost: Callable[[str], None]) -> None:
        for work in (partial(self._exchange_signs, store), partial(self._judge, lost)):
            self._threads.append(threading.Thread(target=work, name="watch", daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        """Python aborts a process that ends while one of its threads is inside the store."""
        self._over.set()
        for thread in self._threads:
            thread.join(_ANSWER)

    def late(self) -> str:
        """Who has not come to the last exchange, as far as it is known."""
        calls = {member: int(sign.split()[1]) for member, sign in self._signs.items()}
        late = [self._names[member] for member, count in calls.items() if count < self.calls]
        return ", ".join(late) or "another process of the run"

    def _exchange_signs(self, store: "Store") -> None:
        """Writes own signs and reads those of others, until the store does not answer: without an
        answer this thread may wait for ever."""
        number = 0
        with suppress(RuntimeError):
            while not self._over.wait(_BEAT):
                number += 1
                store.set(f"sign/{self._rank}", f"{number} {self.calls}")
                known = [m for m in self._others if store.check([f"sign/{m}"])]
                self._signs = {m: store.get(f"sign/{m}").decode() for m in known}
                self._answers += 1

    def _judge(self, lost: Callable[[str], None]) -> None:
        """Calls `lost` once for whoever has been silent for too long, the store first: where that
        is silent, nothing is known of the members."""
        last: dict[str, object] = {}
        heard: dict[str, float] = {}
        while not self._over.wait(_BEAT):
            now = time.monotonic()
            signs: dict[str, object] = {"the store, on the first host,": self._answers}
            signs |= {self._names[m]: self._signs.get(m) or "none" for m in self._others}
            heard |= {name: now for name, sign in signs.items() if last.get(name) != sign}
            last = signs
            for name, time_heard in heard.items():
                if now - time_heard > _SILENCE:
                    return lost(f"{name} has given no sign of life for {_SILENCE:g} seconds")


def is_shared() -> bool:
    """Whether torchrun has started this process as one of several."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in needed) and os.environ["WORLD_SIZE"] != "1"


def is_first() -> bool:
    """Whether this process is alone, or the one that speaks for several."""
    return not is_shared() or os.environ["RANK"] == "0"


def refuse_to_share(text: str) -> None:
    """Raises InputError where torchrun has started several processes for what one must do; all but
    the first end without a word. `text` says what is not done."""
    if is_shared() and not is_first():
        raise SystemExit(InputError.exit_code)
    if is_shared():
        raise InputError(f"{text} under torchrun; run it as one process")


def own_device(name: str) -> str:
    """The device that `name` means here: where several processes share a host, each takes a GPU."""
    import torch

    if not is_shared() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def join(device: "torch.device", say: Callable[[str], None]) -> Team:
    """The team that torchrun has started this process in; alone where it has not.

    If a member is lost later, a line of it is given to `say` and the process ends: torchrun then
    ends the others, or starts all of them again. Raises Elsewhere for members that do not begin.
    """
    if not is_shared():
        return Team()
    import torch
    from torch.distributed import PrefixStore, rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_START))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of torchrun do not meet: {said_by(error)}") from None
    # Processes that torchrun starts again have another store; a program that joins again does not.
    prefix = f"grokquant/{store.add(f'grokquant/joined/{rank}', 1)}"

    def lost(team: Members, what: str) -> None:
        team.say(what, say)
        os._exit(Elsewhere.exit_code)  # the main thread waits inside a library, for the lost one

    return Members(PrefixStore(prefix, store), rank, size, device, lost)


def _in_time(ask: Callable[[], T]) -> T | None:
    """The answer of a store, None if it does not come: a lost host may let us wait for ever."""
    answers: list[T] = []

    def work() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(_ANSWER)
    return answers[0] if answers else None


def _nccl(store: "Store", rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE
    return ProcessGroupNCCL(store, rank, size, options)


def _names_of_all(store: "Store", rank: int, size: int) -> list[str]:
    """How errors call the members. Raises Elsewhere if some do not begin."""
    store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
    late = set(range(size))
    end = time.monotonic() + _START.total_seconds()
    while late:
        late -= {member for member in late if store.check([f"name/{member}"])}
        if late and time.monotonic() > end:
            missing = ", ".join(f"rank {member}" for member in sorted(late))
            raise Elsewhere(f"{missing} did not begin within {_START}")
        time.sleep(0.02 * bool(late))
    return [store.get(f"name/{member}").decode() for member in range(size)]


def _rows_of(
    given: "Sequence[Routed]", tasks: Sequence[int], rows_of: "Callable[[Routed], Tensor]"
) -> "Tensor":
    """The rows for some tasks, one task after the other."""
    import torch

    none = rows_of(given[0])[:0]
    return torch.cat([none, *(rows_of(given[task]) for task in tasks)])


def _brought_guide(
    like: "Guide | None", bring: "Callable[[Callable[[Routed], Tensor]], Tensor]"
) -> "Guide | None":
    """The guides of all tasks of this process in one, if tasks have any, `like` one of them."""

    def own(routed: "Routed") -> "Guide":
        assert routed.guide is not None
        return routed.guide

    return like and replace(
        like,
        inputs=bring(lambda routed: own(routed).inputs[routed.token]),
        weight=bring(lambda routed: own(routed).weight),
        row=bring(lambda routed: own(routed).row),
    )


def _first_of_round(owners: Sequence[int]) -> list[int]:
    """For each task the first one of its round, in which no member has two: those of a round are
    begun together."""
    firsts: list[int] = []
    first = 0
    for task, owner in enumerate(owners):
        if owner in owners[first:task]:
            first = task
        firsts.append(first)
    return firsts


def _places(counts: "Tensor") -> "Iterator[Tensor]":
    """Where the rows of each task are, among those that come in the order of members.

    `counts` [members, tasks]:   | member 0: task 0, task 1 | member 1: task 0, task 1 |
    """
    import torch

    ends = counts.flatten().cumsum(0).view(counts.shape)
    for task in range(counts.shape[1]):
        spans = zip((ends - counts)[:, task].tolist(), ends[:, task].tolist(), strict=True)
        yield torch.cat([torch.arange(first, end) for first, end in spans])


def _put(outputs: "Tensor", token: "Tensor", part: slice, y: "Tensor") -> None:
    outputs[token[part]] = y


def _fill(outputs: "Tensor", part: slice, y: "Tensor") -> None:
    outputs[part] = y


def _bytes_of(tensor: "Tensor") -> "Tensor":
    """The bytes of a tensor in main memory, a view of them if it is contiguous."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8)
