"""Calls of user code: objectives, losses, heads and statistics, with all that may go wrong around them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch import nn

from ecotone.fitness.backends.base import Backend
from ecotone.fitness.guards import Change, Guards, SpoiledError, User, tell
from ecotone.fitness.objectives import CallableObjective
from ecotone.fitness.surroundings import Signals, Surroundings
from ecotone.populations.errors import InputError
from ecotone.registry import is_ours

Returned = TypeVar("Returned")


def is_foreign(kind: type, *heads: Any) -> bool:
    """Whether it is user code: a Python function, a kind of another package, or one with a head of the user's.

    Args:
        kind: The class of an objective, a task or a statistic.
        heads: Its heads, if it has any.
    """
    others = [getattr(head, "function", head) for head in heads if head is not None]
    return issubclass(kind, CallableObjective) or not is_ours(kind) or not all(map(_is_own, others))


def _is_own(head: Any) -> bool:
    """Whether a head is a function of this layer, which changes nothing; those of examples are like the user's."""
    return str(getattr(head, "__module__", "")).startswith("ecotone.fitness.")


class Supervisor:
    """Calls user code, and keeps the model and the process as they were.

    Args:
        backend: Shows candidates.
        heads: Modules that are not merged.
    """

    def __init__(self, backend: Backend, heads: Iterable[nn.Module] = ()) -> None:
        self._backend = backend
        self._users: dict[Hashable, User] = {}
        self._shown: Any = backend.model
        self._noted = False  # whether the guards know the weights that are shown
        self._own = User("the model", foreign=False)
        self._was_careful = False
        self._caught: SpoiledError | None = None  # a thread that lives was seen to change the model
        self.signals: Signals = Signals()
        self._surroundings = Surroundings(self.signals)
        self._guards = Guards(backend.model, getattr(backend, "rewritten", None), heads)

    def begin(self) -> None:
        """The process is as it should be: a batch is about to be measured."""
        self._guards.begin()
        self._surroundings.here()
        if any(user.foreign for user in self._users.values()):
            self._surroundings.begin()

    def user(self, sort: str, name: str, foreign: bool) -> User:
        """What is known of the code of that name.

        Args:
            sort: ``objective``, ``calibration`` or ``statistics``.
            name: Its name.
            foreign: Whether it is the user's own code.
        """
        key = sort, name
        if key not in self._users:
            self._users[key] = User(f"{sort.split(' ')[0]} {name!r}", foreign)
        return self._users[key]

    def shown(self, model: Any) -> None:
        """The backend has put a candidate's weights into ``model``.

        Raises:
            SpoiledError: Threads that user code has left behind change the model now, or in a way that cannot be put
                back.
        """
        self._shown = model
        self._noted = False
        if leaver := self._surroundings.strays:
            self._note()
            changes, again = self._guards.after(leaver)
            if again:
                raise self._by_threads(leaver, changes)
            self._surroundings.forget()
            self._surroundings.mark()
            if self._caught is not None and self._surroundings.strays is not None:
                raise self._caught
        self._caught = None

    def call(self, user: User, function: Callable[[], Returned], *, follows: bool) -> Returned:
        """What ``function`` returns. An exception of any kind goes on, as a signal's handler raised it if it did.

        Args:
            user: Whose code it is.
            function: Calls the code.
            follows: Whether other code uses the same weights afterwards.

        Raises:
            SpoiledError: An earlier call has changed what cannot be put back.
        """
        self._was_careful = self.careful
        careful = user.foreign or self._was_careful
        if careful and not self._noted:
            self._note()
        if careful and (follows or self._was_careful or not user.foreign):
            self._guards.watch(whole=user.calls == 0 or self._was_careful)
        if user.foreign:
            self._surroundings.before()
        try:
            returned = function()
        except BaseException as error:
            self._surroundings.end_fork()
            self.signals.pass_on(error)
            raise
        else:
            self._surroundings.end_fork()
            self.signals.pass_on()
            return returned
        finally:
            if user.foreign:
                self._surroundings.after(user)

    @property
    def careful(self) -> bool:
        """Whether threads live that user code has left behind: then each call is looked at, ours too."""
        return self._surroundings.strays is not None

    def _note(self) -> None:
        self._guards.shown(self._shown)
        self._noted = True

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Put back at the end what a model's own ``forward`` has changed, if it has; that is told to nobody."""
        yield
        with suppress(InputError):  # it is raised again when user code is called
            self.restore(self._own, merged=False)

    def restore(self, user: User, *, merged: bool = True, fixed: bool = True) -> bool:
        """Put back what the code has changed in the model and in torch.

        Args:
            user: Whose code it is.
            merged: Whether ``shown`` was called before it.
            fixed: Whether the tensors that are not merged are those of merges: an expert has its own.

        Returns:
            Whether the weights must be merged again before other code uses them.

        Raises:
            SpoiledError: Something cannot be put back, or threads that user code left behind may have changed the model
                while it was scored.
        """
        leaver = self._surroundings.strays
        if leaver is not None:
            self._surroundings.mark()
        changes, again = self._guards.after(user, merged=merged and self._noted, fixed=fixed, blamed=leaver)
        if again or leaver is not None:
            self.distrust()
        if leaver is not None and any(change.kind for change in changes):
            raise self._by_threads(leaver, changes)
        return again or (leaver is not None and not self._was_careful)

    @contextmanager
    def merged_again(self) -> Iterator[None]:
        """The weights that are shown are merged once more: threads that live write into neither, or both differ.

        Raises:
            SpoiledError: They differ.
        """
        leaver, first = self._surroundings.strays, self._guards.digest()
        self.distrust()
        yield
        if self._guards.digest(keep=True) != first and leaver is not None:
            raise self._by_threads(leaver, [Change("weights")])

    def call_loss(self, user: User, model: nn.Module, function: Callable[[], Returned]) -> Returned:
        """What ``function`` returns, a loss of ``model``; other losses and the backward pass use the same weights.

        Raises:
            InputError: It wrote into the weights: neither its gradient nor the next one's would be that of the merge.
            SpoiledError: A thread that user code has left behind may have.
        """
        if not (user.foreign or self.careful):
            return self.call(user, function, follows=True)
        self._guards.shown(model)
        self._shown, self._noted = model, True
        inside = self._guards.inside(model)
        returned = self.call(user, function, follows=True)
        leaver = self._surroundings.strays
        tell(leaver or user, inside.mend())
        if written := self._guards.written():
            self.distrust()
            if leaver is not None:
                raise self._by_threads(leaver, [Change("weights", written[0])])
            raise InputError(
                f"{user.subject} wrote into the model's weights ({written[0]}) while its gradient was taken.",
                "Have it work on a copy: copy.deepcopy(model).",
            )
        return returned

    def distrust(self) -> None:
        """The next ``show`` writes all tensors again."""
        if distrust := getattr(self._backend, "distrust", None):
            distrust()

    def _by_threads(self, leaver: User, changes: list[Change]) -> SpoiledError:
        places = ", ".join(filter(None, (change.place for change in changes[:3])))
        what = ": ".join(filter(None, (changes[0].kind, places)))
        self._caught = SpoiledError(
            f"{leaver.subject} left threads behind, and the model was changed ({what}) while they lived.",
            "Have it end its threads.",
        )
        return self._caught
