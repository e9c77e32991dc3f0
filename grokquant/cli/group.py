"""What all commands have in common: signs of life, and errors as one line and an exit code."""

import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from grokquant import parallel
from grokquant.cli.printing import bounded, say_error, say_nothing, say_own
from grokquant.errors import GrokquantError, InputError, OutOfMemory, Stopped
from grokquant.memory import memory_for
from grokquant.reporting.signs_of_life import SignsOfLife, silence

if TYPE_CHECKING:
    import torch

# By option: what errors say of its key, and what a command that has the option says instead.
_KEYS_IN_WORDS = {
    "--field": ("by the key field", "by --field"),
    "--output": ("another output.path", "another --output"),
}
_TEAM = "grokquant.team"  # the key of the team of a command in click's contexts


class Command(click.Command):
    """A command whose context has its `SignsOfLife`.

    `doing` says what it does first, which can take long; `shared`, that several processes carry it
    out together; `less_memory` is added to the error when memory runs out.
    """

    def __init__(
        self,
        *given: Any,
        doing: str = "working",
        shared: bool = False,
        less_memory: str = "",
        **attributes: Any,  # of any command of click
    ) -> None:
        super().__init__(*given, **attributes)
        self.doing = doing
        self.shared = shared
        self.less_memory = less_memory

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            has_keys = any(parameter.name == "overrides" for parameter in self.params)
            if has_keys and (keys := _keys_of(error.option_name)):
                ways = " or ".join(f"--set {key}=VALUE" for key in keys)
                text = f"No such option '{error.option_name}'; the recipe has it: {ways}"
                raise click.UsageError(text, ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> object:
        name = self.name or "grokquant"
        if not self.shared:
            parallel.refuse_to_share(f"{name}: does not run")
        doing = f"{name}: {self.doing}"
        say = say_error if parallel.is_first() else say_nothing
        ctx.obj = SignsOfLife(doing, say, silence())
        with ctx.obj, memory_for(name):
            return super().invoke(ctx)

    def told(self, error: GrokquantError) -> str:
        """`error` in words of this command: `--overwrite` for `overwrite=True`."""
        text = str(error)
        if isinstance(error, InputError) and (named := self._option(error.key)):
            text = f"{named}: {error.text}"
        for option in self._options():
            if option.is_flag:
                text = text.replace(f"{option.name}=True", option.opts[0])
            elif words := _KEYS_IN_WORDS.get(option.opts[0]):
                text = text.replace(*words)
        return text + self.less_memory if isinstance(error, OutOfMemory) else text

    def _option(self, key: str | None) -> str | None:
        """The option, such as `--samples`, that sets parameter or recipe key `key`."""
        if key is None:
            return None
        named = {key.replace(".", "_"), f"--{key}"}
        return next((o.opts[0] for o in self._options() if named & {o.name, o.opts[0]}), None)

    def _options(self) -> list[click.Option]:
        return [parameter for parameter in self.params if isinstance(parameter, click.Option)]


def _keys_of(option: str) -> list[str]:
    """The keys of a recipe that are called like an option."""
    from grokquant.recipe.reading import places_of

    return places_of(option.removeprefix("--").replace("-", "_"))


class Commands(click.Group):
    """Turns errors and interruptions of any command into one line and an exit code."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return self._invoke(ctx)
        finally:
            # From here on an interruption ends the process, without a traceback of its cleanup.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)

    def _invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except GrokquantError as error:
            code = error.exit_code
            invoked = self.commands.get(ctx.invoked_subcommand or "")
            text = invoked.told(error) if isinstance(invoked, Command) else str(error)
        except BrokenPipeError:
            raise  # the reader closed the pipe; click handles that
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            code, text = 2, f"{where}{error.strerror or error}"
        except Stopped as stopped:
            code, text = stopped.exit_code, str(stopped)
        except KeyboardInterrupt:
            code, text = 130, "interrupted; no output was written"
        team = ctx.meta.get(_TEAM) or parallel.Team()
        team.say(bounded(text), say_own)
        team.leave()
        ctx.exit(code)


command = partial(click.command, cls=Command)


def join_team(device: str) -> "tuple[torch.device, parallel.Team]":
    """Where a shared command computes, and the processes that it shares its work with.

    An error in the command is told by one of them, and all of them leave. Raises InputError.
    """
    from grokquant.devices import device_of

    place = device_of(parallel.own_device(device))
    team = parallel.join(place, say_own)
    click.get_current_context().meta[_TEAM] = team
    return place, team
