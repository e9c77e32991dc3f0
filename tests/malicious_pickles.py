"""Pickles that would run something if they were unpickled, each as a file of a release.

Names are those of advisories about picklescan, fickling, torch.load and numpy; the last part turns
good tensor files into type confusion. Run as a program, it reads all of them in a process whose
audit hook notes what Python is made to do, and prints that as JSON.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import tempfile
from pathlib import Path

from test_sources_pickles import NUMPY_1, changed, framed, name, text

# What a call of which would be harm, by module.
CALLS = {
    "builtins": "eval exec compile open getattr setattr __import__ breakpoint vars map type",
    "__builtin__": "eval execfile",
    "os": "system popen execv spawnl remove putenv",
    "posix": "system fork",
    "nt": "system",
    "subprocess": "Popen run check_output getoutput",
    "_posixsubprocess": "fork_exec",
    "pty": "spawn",
    "sys": "exit setprofile modules.__getitem__",
    "importlib": "import_module reload",
    "importlib.util": "spec_from_file_location",
    "pkgutil": "resolve_name",
    "runpy": "run_path _run_code",
    "imp": "load_source",
    "zipimport": "zipimporter",
    "types": "CodeType FunctionType",
    "operator": "attrgetter methodcaller itemgetter",
    "_operator": "attrgetter",
    "functools": "partial reduce",
    "itertools": "starmap",
    "copyreg": "_reconstructor add_extension",
    "pickle": "loads Unpickler",
    "_pickle": "loads",
    "marshal": "loads",
    "shelve": "open",
    "dbm": "open",
    "sqlite3": "connect",
    "ctypes": "CDLL cdll.LoadLibrary",
    "code": "interact InteractiveInterpreter.runcode",
    "codeop": "compile_command",
    "bdb": "Bdb.run",
    "pdb": "run",
    "cProfile": "run",
    "profile": "Profile.runctx",
    "trace": "Trace.run",
    "timeit": "timeit",
    "doctest": "debug_script",
    "pydoc": "pipepager locate",
    "_pyrepl.pager": "pipe_pager",
    "_aix_support": "_read_cmd_output",
    "_osx_support": "_read_output",
    "uuid": "_get_command_stdout",
    "lib2to3.pgen2.grammar": "Grammar.loads",
    "lib2to3.pgen2.pgen": "ParserGenerator.make_label",
    "idlelib.run": "Executive.runcode",
    "idlelib.pyshell": "ModifiedInterpreter.runcode",
    "idlelib.debugobj": "ObjectTreeItem.SetText",
    "idlelib.calltip": "get_entity",
    "ensurepip": "_run_pip",
    "pip": "main",
    "pip._internal": "main",
    "venv": "create",
    "distutils.file_util": "write_file",
    "shutil": "rmtree copyfile",
    "tempfile": "mkstemp",
    "fileinput": "input",
    "linecache": "getline",
    "logging.config": "listen dictConfig",
    "multiprocessing.util": "spawnv_passfds",
    "asyncio.unix_events": "_UnixSubprocessTransport._start",
    "threading": "Timer",
    "atexit": "register",
    "signal": "signal",
    "gc": "get_objects",
    "webbrowser": "open",
    "socket": "create_connection",
    "ssl": "get_server_certificate",
    "urllib.request": "urlopen urlretrieve",
    "http.client": "HTTPSConnection",
    "ftplib": "FTP",
    "smtplib": "SMTP",
    "imaplib": "IMAP4_stream",
    "telnetlib": "Telnet",
    "xmlrpc.client": "ServerProxy",
    "requests.api": "get",
    "aiohttp.client": "ClientSession",
    "numpy": "load fromfile memmap",
    "numpy.testing._private.utils": "runstring",
    "numpy.f2py.crackfortran": "getlincoef param_eval _eval_length",
    "numpy.core.multiarray": "scalar fromstring",
    "numpy._core.numeric": "_frombuffer",
    "torch": "load storage._load_from_bytes",
    "torch.serialization": "load",
    "torch.hub": "load",
    "torch.jit.unsupported_tensor_ops": "execWrapper",
    "torch.utils._config_module": "ConfigModule.load_config",
    "torch.utils.bottleneck.__main__": "run_cprofile",
    "torch.utils.collect_env": "run",
    "torch.fx.experimental.symbolic_shapes": "ShapeEnv.evaluate_guards_expression",
    "torch._dynamo.guards": "GuardBuilder.get",
    "torch._inductor.codecache": "compile_file",
    "torch._utils": "_rebuild_tensor_v2 _rebuild_wrapper_subclass",
    "jax._src.array": "_reconstruct_array",
    "ml_dtypes": "finfo",
    "joblib": "load",
    "dill": "loads",
    "cloudpickle": "loads",
    "pandas": "read_pickle eval",
    "__main__": "__loader__ __builtins__.eval",
}
COMMAND = b"touch owned"


def short(raw: bytes) -> bytes:
    """A string as SHORT_BINUNICODE, whatever its bytes are."""
    return b"\x8c" + bytes([len(raw)]) + raw


def call(module: str, function: str) -> bytes:
    return name(module, function) + short(COMMAND) + b"\x85R"


SYSTEM = name("os", "system")
RUN = SYSTEM + short(COMMAND) + b"\x85R"
GOOD = NUMPY_1[11:]
FIELDS = GOOD.index(b"}\x94(") + 3  # behind the mark of the record's fields
EXPANDING = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40))
I1 = b"\x8c\x02i1\x94\x89\x88\x87"
STATE = b"(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b"
FIELD_OF_OBJECT = text("a") + b"\x85}(" + text("a") + name("numpy", "dtype") + text("O") + b"\x85R"
FORMS = {
    # the same call in every way that a pickle has
    "GLOBAL": framed(b"cos\nsystem\n" + short(COMMAND) + b"\x85R."),
    "GLOBAL unframed": b"\x80\x04cos\nsystem\n" + short(COMMAND) + b"\x85R.",
    "GLOBAL, protocol 0": b"cos\nsystem\n(Vtouch owned\ntR.",
    "GLOBAL, protocol 2": b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch owned\x85R.",
    "STACK_GLOBAL unframed": b"\x80\x04" + RUN + b".",
    "STACK_GLOBAL, protocol 5": b"\x80\x05\x95" + struct.pack("<Q", len(RUN) + 1) + RUN + b".",
    "STACK_GLOBAL of BINUNICODE": framed(
        b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93" + short(COMMAND) + b"\x85R."
    ),
    "STACK_GLOBAL of STRING": framed(b"S'os'\nS'system'\n\x93" + short(COMMAND) + b"\x85R."),
    "STACK_GLOBAL from the memo": framed(
        text("system") + b"\x94" + text("os") + b"\x94h\x01h\x00\x93" + short(COMMAND) + b"\x85R."
    ),
    "STACK_GLOBAL from LONG_BINGET": framed(
        text("os") + b"\x94" + text("system") + b"\x94j\0\0\0\0j\x01\0\0\0\x93)R."
    ),
    "INST": framed(b"(" + short(COMMAND) + b"ios\nsystem\n."),
    "OBJ": framed(b"(cos\nsystem\n" + short(COMMAND) + b"o."),
    "NEWOBJ": framed(name("subprocess", "Popen") + short(COMMAND) + b"\x85\x81."),
    "NEWOBJ_EX": framed(name("subprocess", "Popen") + short(COMMAND) + b"\x85}\x92."),
    "EXT1": framed(b"\x82\x01."),
    "EXT2": framed(b"\x83\xff\xff."),
    "EXT4": framed(b"\x84\xff\xff\xff\x7f."),
    "PERSID": b"\x80\x04Pos.system\n.",
    "BINPERSID": framed(RUN + b"Q."),
    "BUILD of a class": framed(name("numpy", "ndarray") + b"}" + text("a") + RUN + b"sb."),
    "BUILD with slots": framed(name("__main__", "QuantizedWeight8bit") + b")\x81N}\x86b."),
    "BUILD appended": NUMPY_1[:-1] + name("os", "system") + b"b.",
    "BUILD appended in the frame": framed(GOOD[:-1] + b"}b."),
    "SETITEMS on a module": framed(name("sys", "modules") + b"(" + text("a") + RUN + b"u."),
    "APPEND to a list": framed(b"]" + RUN + b"a."),
    "two calls": framed(name("builtins", "getattr") + SYSTEM + text("x") + b"\x86R)R."),
    "a call whose result is dropped": framed(RUN + b"0" + GOOD),
    "a call whose mark is dropped": framed(b"(" + RUN + b"1" + GOOD),
    "a call that stays on the stack": framed(RUN + GOOD),
    "a call behind the end": NUMPY_1 + RUN + b".",
    "a call behind the end in the frame": framed(GOOD + RUN + b"."),
    "a second pickle": NUMPY_1 + b"\x80\x04" + RUN + b".",
    "a pickle in a pickle": framed(
        name("pickle", "loads") + b"C" + bytes([len(RUN) + 3]) + b"\x80\x04" + RUN + b".\x85R."
    ),
    # within a good file
    "a call for the weight": framed(
        GOOD[:FIELDS] + text("weight") + RUN + text("scales") + RUN + b"ub."
    ),
    "a call for a further field": framed(GOOD[:-3] + text("x") + RUN + b"ub."),
    "a call for a key": framed(GOOD[:FIELDS] + RUN + b"N" + GOOD[FIELDS:]),
    "a call for a dtype": changed(text("i1"), RUN),
    "a call for a shape": changed(b"K\x02K\x03K\x04\x87", RUN),
    "a call for the contents": changed(b"C\x18" + bytes(range(24)), RUN),
    "a call for the byte order": changed(text("|"), RUN),
    "a call for the class of an array": changed(b"C\x01b", RUN),
    "another class for the record": changed(text("QuantizedWeight8bit"), text("Path")),
    "another module for the record": changed(text("__main__"), text("os")),
    "another function for the array": changed(text("_reconstruct"), text("fromfile")),
    "another class for the array": changed(text("ndarray"), text("memmap")),
    # names that are not what they seem
    "a name with dots": framed(call("numpy", "f2py.crackfortran.param_eval") + b"."),
    "a module with dots": framed(call("numpy.core", "multiarray._reconstruct") + b"."),
    "a name of an allowed class": framed(call("numpy", "ndarray.__class__.__subclasses__") + b"."),
    "a newline in a name": framed(call("numpy\nos", "ndarray\nsystem") + b"."),
    "a null in a name": framed(call("os\0", "system") + b"."),
    "a space in a name": framed(call("numpy ", "ndarray") + b"."),
    "letters like others": framed(call("numрy", "ndаrray") + b"."),
    "letters that join": framed(short("numpy\u200d".encode()) + text("ndarray") + b"\x93."),
    "not UTF-8": framed(short(b"os\xff") + text("system") + b"\x93."),
    "half a character": framed(short(b"os\xed\xa0\x80") + text("system") + b"\x93."),
    "too long for UTF-8": framed(short(b"\xc1\xafs") + text("system") + b"\x93."),
    "no name": framed(short(b"") + short(b"") + b"\x93."),
    "a global of a tuple": framed(text("os") + text("system") + b"\x86\x93."),
    "a global of bytes": framed(b"C\x02osC\x06system\x93."),
    # memo
    "a name memoized twice": framed(
        text("numpy") + b"\x94\x94" + text("ndarray") + b"\x94h\x00h\x02\x93."
    ),
    "a name put over another": framed(
        text("numpy") + b"q\x00" + text("os") + b"q\x00" + text("system") + b"\x93."
    ),
    "a memo of 2^31": framed(b"Nr\xff\xff\xff\x7f."),
    "a memo in text": framed(b"Np999999999999\n."),
    "a memo that never was": framed(b"h\xc8."),
    # bombs
    "billion laughs": framed(EXPANDING + b"."),
    "billion laughs as a key": framed(b"}(" + EXPANDING + b"Nu."),
    "billion laughs as a shape": changed(b"K\x02K\x03K\x04\x87", EXPANDING),
    "a dictionary in itself": framed(b"}\x94(" + text("a") + b"h\x00u."),
    "deep": framed(b")" + b"\x85" * 180 + b"."),
    "deep lists": framed(b"](" * 50_000 + b"."),
    "marks": framed(b"(" * 1_000_000 + b"."),
    "2^62 in LONG1": framed(b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"."),
    "2^(2^33) in LONG4": framed(b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\x01."),
    "a digit bomb": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "bytes of 2^63": framed(b"\x8e" + struct.pack("<Q", 1 << 63) + b"."),
    "bytes of 2^40": framed(b"\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "text of 2^62": framed(b"\x8d" + struct.pack("<Q", 1 << 62) + b"."),
    "a byte array of 2^62": framed(b"\x96" + struct.pack("<Q", 1 << 62) + b"."),
    "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + RUN + b".",
    "a frame of 2^64 - 1": b"\x80\x04\x95" + b"\xff" * 8 + RUN + b".",
    "a frame that ends early": b"\x80\x04\x95" + struct.pack("<Q", 4) + RUN + b".",
    "a frame that ends late": b"\x80\x04\x95" + struct.pack("<Q", 9999) + RUN + b".",
    "a frame of nothing": b"\x80\x04\x95" + bytes(8) + RUN + b".",
    "frames within frames": framed(framed(RUN + b".")[2:]),
    # type confusion of numpy
    "an array of objects": changed(I1, I1.replace(b"i1", b"O8")),
    "a field of objects": changed(STATE, STATE.replace(b"NNN", b"N" + FIELD_OF_OBJECT + b"u")),
    "flags of objects": changed(STATE, STATE.replace(b"K\x00t", b"K\x3ft")),
    "a state set again": changed(STATE, STATE + STATE.replace(b"K\x00t", b"K\x3ft")),
    "a dtype changed after its array": framed(
        GOOD[: GOOD.index(text("scales"))] + b"h\x0a" + STATE + b"0" + GOOD[-1:]
    ),
    "values of 8 bytes in 1": changed(
        STATE, STATE.replace(b"J\xff\xff\xff\xff", b"K\x08", 1)
    ),
    "a subarray": changed(STATE, STATE.replace(b"NNN", b"h\x00K\x02\x85\x86NN")),
    "metadata": changed(STATE, STATE.replace(b"K\x00t", b"K\x00}t")),
    "a subclass of bytes": changed(
        b"C\x18" + bytes(range(24)), name("_codecs", "encode") + text("a" * 24) + b"\x85R"
    ),
    "a list for the contents": changed(b"C\x18" + bytes(range(24)), b"]" + RUN + b"a"),
}  # fmt: skip
MALICIOUS = {
    f"{module}.{function}": framed(call(module, function) + b".")
    for module, functions in CALLS.items()
    for function in functions.split()
} | FORMS

heard: list[str] = []
listening = False


def hook(event: str, arguments: tuple) -> None:
    if listening:
        heard.append(f"{event} {arguments[0] if arguments else ''}")


@contextlib.contextmanager
def listened() -> object:
    """Notes what Python does within the block, in `heard`."""
    global listening
    heard.clear()
    listening = True
    try:
        yield
    finally:
        listening = False


def main() -> None:
    from grokquant.errors import InputError
    from grokquant.sources.pickles import read_headers

    sys.addaudithook(hook)
    found: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        path = Path("tensor00000_000")
        for case, raw in MALICIOUS.items():
            path.write_bytes(raw)
            modules = len(sys.modules)
            complaint = None
            with listened():
                try:
                    read_headers(path)
                except InputError as error:
                    complaint = str(error)
            found[case] = [complaint, list(heard), len(sys.modules) - modules, os.listdir()]
        with listened():
            pickle.load(io.BytesIO(framed(name("builtins", "eval") + text("1") + b"\x85R.")))
        found["unpickled"] = [None, list(heard), 0, os.listdir()]
        os.chdir("/")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
