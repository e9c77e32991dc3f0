"""What a file is that is not what its name says, and what to do about it."""

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
# What a download server writes in place of a file.
_ANSWERS = (
    b"entry not found",
    b"not found",
    b"repository not found",
    b"invalid username or password",
)


def impostor(head: bytes) -> str | None:
    """What a file with these first bytes is, where it is no file of a model; None if unknown."""
    if not head:
        return "is empty; get it again from where it came from"
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; run git lfs pull, or download it again"
    if start.startswith(_PAGES):
        return (
            "is a web page, not the file itself; download it again, after a login if it needs one"
        )
    if start.startswith(_ANSWERS):
        answer = start.splitlines()[0][:40].decode("ascii", "replace")
        return f"holds a server's answer ({answer!r}), not the file itself; download it again"
    return None
