"""Who makes which matrix and who writes which file, where several processes make one result.

Known before the run begins, on all members alike:

    expert       made by the member that has the least to do in its layer, by the cost of Hessians
                 and solves; nobody else ever holds these Hessians
    file         written by the maker of its first expert, or by whoever has the fewest bytes
    other unit   made by whoever writes its file
"""

from grokquant.containers.container import PlannedFile
from grokquant.errors import InputError
from grokquant.job.plan import Plan
from grokquant.parallel import Team
from grokquant.types import Unit


class Division:
    """The division of a plan among the members of `team`."""

    def __init__(self, plan: Plan, team: Team) -> None:
        self.plan = plan
        self.team = team
        sizes = [file.layout.size for file in plan.files]
        writers = team.assign(sizes)
        self._writer = {file.name: m for file, m in zip(plan.files, writers, strict=True)}

    def check(self) -> None:
        """Raises InputError for a plan that cannot be divided."""
        if self.plan.needs_calibration and self.team.is_divided:
            raise InputError("recipe: quantize: methods that need data do not run under torchrun")

    def writer_of(self, file: PlannedFile) -> int:
        return self._writer[file.name]

    def maker_of(self, unit: Unit) -> int:
        return self.writer_of(self.file_of(unit))

    def file_of(self, unit: Unit) -> PlannedFile:
        """The file of a unit, whose parts are never split."""
        return self.plan.file_of[self.plan.parts_of(unit.tensor)[0]]

    def is_written_here(self, file: PlannedFile) -> bool:
        return self.team.is_here(self.writer_of(file))

    def is_made_here(self, unit: Unit) -> bool:
        return self.team.is_here(self.maker_of(unit))
