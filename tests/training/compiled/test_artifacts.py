"""What was compiled is found again, in this process or a folder, and nothing else is run."""

import hashlib
import inspect
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive import CompiledSVI
from pyro_recursive.tracing.graphs import artifacts, compiler
from pyro_recursive.tracing.graphs.artifacts import ArtifactFolder, secret_file
from pyro_recursive.tracing.graphs.compiler import CompilePolicy, compile_policy, compiled_once
from pyro_recursive.tracing.graphs.kernels import KernelCalls, compile_graph

X = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def graph(*tensors: Tensor, factor: float = 2.0) -> Any:
    """Return a graph that changes its first input in place."""

    def update(x: Tensor, *rest: Tensor) -> list[Tensor]:
        x.copy_(factor * x + 1.0)
        return []

    with torch.no_grad():
        return make_fx(update, tracing_mode="fake")(*tensors)


class Artifact:
    """Stands for compiled code."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, *args: Any) -> None:
        self.runs += 1

    def serialize(self) -> bytes:
        return b"compiled"


class Compiler:
    """Counts what is compiled."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, options: dict[str, Any]) -> Any:
        self.calls += 1
        return Artifact()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_kept", OrderedDict())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


# In one process.


def test_the_same_graph_is_compiled_once() -> None:
    compile = Compiler()
    first = compiled_once(graph(X), [X], {}, compile)
    assert compiled_once(graph(X), [X + 3.0], {}, compile) is first
    assert compile.calls == 1


OTHERS: dict[str, Callable[[], tuple[Any, list[Tensor], dict[str, Any]]]] = {
    "constant": lambda: (graph(X, factor=2.5), [X], {}),
    "constant in its last digit": lambda: (graph(X, factor=2.0 + 2**-51), [X], {}),
    "shape": lambda: (graph(X[:2]), [X[:2]], {}),
    "dtype": lambda: (graph(X.float()), [X.float()], {}),
    "stride": lambda: (graph(X), [torch.stack([X, X], 1)[:, 0]], {}),
    "option": lambda: (graph(X), [X], {"cpp_wrapper": True}),
    "more inputs": lambda: (graph(X, X.clone()), [X, X.clone()], {}),
    "inputs in the same memory": lambda: (graph(X, X.clone()), [X, X[:]], {}),
    "threads": lambda: (graph(X), [X], {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_graph_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    compiled_once(graph(X, X.clone()), [X, X.clone()], {}, compile)
    before = compile.calls
    if name == "more inputs":
        compiler._kept.popitem()
    if name == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    module, tensors, options = OTHERS[name]()
    compiled_once(module, tensors, options, compile)
    assert compile.calls == before + 1


def test_graphs_that_hold_tensors_are_compiled_each_time() -> None:
    def update(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0])

    compile, module = Compiler(), make_fx(update)(X)
    assert "get_attr" in {node.op for node in module.graph.nodes}
    for _ in range(2):
        compiled_once(module, [X], {}, compile)
    assert compile.calls == 2


def test_a_number_of_graphs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    compile = Compiler()
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0):  # the one used last stays
        compiled_once(graph(X, factor=factor), [X], {}, compile)
    assert compile.calls == 3


# In a folder.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactFolder]:
    monkeypatch.setattr(
        "pyro_recursive.tracing.graphs.artifacts._loaded",
        lambda body: (pickle.loads(body)[0], {}),
    )
    folder = ArtifactFolder(tmp_path / "cache")
    with compile_policy(CompilePolicy(folder)):
        yield folder


def file_of(folder: ArtifactFolder) -> Path:
    (file,) = folder.folder.iterdir()
    return file


def test_a_saved_graph_is_loaded_and_not_compiled(folder: ArtifactFolder) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    for _ in range(2):
        compiler._kept.clear()
        assert compiled_once(graph(X), [X], {}, compile) == b"compiled"
    assert compile.calls == 1


def test_a_graph_that_is_known_is_saved_where_it_is_missing(folder: ArtifactFolder) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    file_of(folder).unlink()
    compiled_once(graph(X), [X], {}, compile)
    assert file_of(folder).exists()
    assert compile.calls == 1


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda content: _flip(content, 0),
    "signature": lambda content: _flip(content, 30),
    "last byte": lambda content: _flip(content, len(content) - 1),
    "truncated": lambda content: content[:-5],
    "longer": lambda content: content + b"0",
    "empty": lambda content: b"",
    "no body": lambda content: content[:40],
    "another body": lambda content: content[:58] + pickle.dumps((Bomb(), {})),
    "a digest without the key": lambda content: (
        content[:26]
        + hashlib.sha256(pickle.dumps((Bomb(), {}))).digest()
        + pickle.dumps((Bomb(), {}))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_was_changed_is_not_read(
    folder: ArtifactFolder, change: Callable[[bytes], bytes]
) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    file = file_of(folder)
    good = file.read_bytes()
    file.write_bytes(change(good))
    compiler._kept.clear()
    with pytest.warns(UserWarning, match=r"is not as .* written it .* compiled anew") as caught:
        compiled_once(graph(X), [X], {}, compile)
    assert len(caught) == 1
    assert compile.calls == 2
    assert file.read_bytes() == good  # written anew


def test_a_file_under_another_name_is_not_read(folder: ArtifactFolder) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    file = file_of(folder)
    compiled_once(graph(X, factor=5.0), [X], {}, compile)
    (other,) = set(folder.folder.iterdir()) - {file}
    shutil.copy(other, file)
    compiler._kept.clear()
    with pytest.warns(UserWarning, match="compiled anew"):
        compiled_once(graph(X), [X], {}, compile)


@pytest.mark.parametrize("way", ["of another user", "others can read it", "short", "a link"])
def test_files_count_for_the_key_that_has_signed_them(folder: ArtifactFolder, way: str) -> None:
    compile, secret = Compiler(), secret_file()
    compiled_once(graph(X), [X], {}, compile)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not secret.is_relative_to(folder.folder)
    if way == "others can read it":
        secret.chmod(0o644)
    elif way == "a link":
        secret.rename(secret.with_suffix(".moved"))
        secret.symlink_to(secret.with_suffix(".moved"))
    else:
        secret.write_bytes(b"k" * (32 if way == "of another user" else 5))
    compiler._kept.clear()
    with pytest.warns(UserWarning) as caught:
        compiled_once(graph(X), [X], {}, compile)
    messages = [str(each.message) for each in caught]
    assert "compiled anew" in messages.pop()
    assert ["It was renewed" in each for each in messages] == [True] * (way != "of another user")
    assert secret.stat().st_mode & 0o777 == 0o600 and not secret.is_symlink()
    assert compile.calls == 2


@pytest.mark.parametrize("what", ["torch", "processor"])
def test_files_of_another_version_are_left_alone(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    compiler._kept.clear()
    compiled_once(graph(X), [X], {}, compile)
    assert compile.calls == 2
    assert len(list(folder.folder.iterdir())) == 2


def test_the_key_does_not_lie_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not hold the key"):
        ArtifactFolder(tmp_path / "config")
    (tmp_path / "config").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "config")
    with pytest.raises(ValueError, match="must not hold the key"):
        ArtifactFolder(tmp_path / "link")


def test_all_that_start_together_have_one_key() -> None:
    for _ in range(20):
        secret_file().unlink(missing_ok=True)
        barrier = threading.Barrier(8)

        def read(barrier: threading.Barrier = barrier) -> bytes:
            barrier.wait()
            return artifacts._secret()

        with ThreadPoolExecutor(8) as pool:
            found = {each.result() for each in [pool.submit(read) for _ in range(8)]}
        assert found == {secret_file().read_bytes()}
        assert list(secret_file().parent.iterdir()) == [secret_file()]


def test_a_key_in_a_folder_that_others_can_write_to_is_not_used(folder: ArtifactFolder) -> None:
    compiled_once(graph(X), [X], {}, Compiler())
    file_of(folder).unlink()
    secret_file().parent.chmod(0o777)
    with pytest.warns(UserWarning, match="cannot be saved.*others can write to the folder"):
        compiled_once(graph(X), [X], {}, Compiler())


def test_an_interrupted_file_is_removed(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(key: str, body: bytes) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "_sign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled_once(graph(X), [X], {}, Compiler())
    assert list(folder.folder.iterdir()) == []


def test_code_that_another_thread_compiles_is_not_looked_for_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    def load(cls: Any, code: str) -> str:
        return f"compiled {code}"

    def deserialize(content: bytes) -> Any:
        return CppCodeCache.load_async("code")

    monkeypatch.setattr(CppCodeCache, "load_async", classmethod(load))
    monkeypatch.setattr(AOTCompiledArtifact, "deserialize", staticmethod(deserialize))
    assert artifacts._loaded(pickle.dumps((b"", {}))) == ("compiled code", {})


def test_a_file_holds_the_libraries_of_its_own_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.codecache import CppCodeCache

    library = SimpleNamespace(__file__=str(tmp_path / "library.so"))
    Path(library.__file__).write_bytes(b"code")
    monkeypatch.setattr(CppCodeCache, "load_async", classmethod(lambda *args: lambda: library))
    with artifacts.recorded_libraries() as libraries:
        other = threading.Thread(target=CppCodeCache.load_async, args=("other",))
        other.start()
        other.join()
        CppCodeCache.load_async("own")
    assert list(libraries().values()) == [b"code"]


def test_a_folder_that_cannot_be_written_is_told(folder: ArtifactFolder) -> None:
    folder.folder.write_text("a file")
    with pytest.warns(UserWarning) as caught:
        compiled_once(graph(X), [X], {}, Compiler())
    assert "cannot be loaded" in str(caught[0].message)
    assert "cannot be saved" in str(caught[1].message)


def test_without_a_place_for_the_key_graphs_are_compiled(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile = Compiler()
    compiled_once(graph(X), [X], {}, compile)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    compiler._kept.clear()
    with pytest.warns(UserWarning) as caught:
        compiled_once(graph(X), [X], {}, compile)
    assert ["cannot be loaded" in str(each.message) for each in caught] == [True, False]
    assert compile.calls == 2


# What is shown, and what is missing.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_compiling_is_shown_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shows in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        compiler._kept.clear()
        with compile_policy(CompilePolicy(shows=shows)):
            for _ in range(2):
                compiled_once(graph(X), [X], {}, Compiler())
        found = stream.getvalue()
        if isinstance(stream, Terminal) and shows:
            assert found.strip() == "Compiling a graph of 3 operations, for some seconds ..."
        else:
            assert found == ""


def model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def svi_of(**options: Any) -> CompiledSVI:
    pyro.clear_param_store()
    torch.manual_seed(0)
    optim = pyro.optim.Adam({"lr": 0.05})
    return CompiledSVI(model, AutoNormal(model), optim, Trace_ELBO(), **options)


@pytest.mark.slow
def test_a_missing_compiler_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    svi, eager = svi_of(engine="flat"), []
    with pytest.warns(UserWarning, match=r"run eagerly: no C\+\+ compiler was found") as caught:
        losses = [svi.step(X) for _ in range(4)]
    assert len(caught) == 1
    svi = svi_of(engine="eager")
    eager = [svi.step(X) for _ in range(4)]
    assert losses == eager
    svi = svi_of(engine="flat", strict=True)
    svi.step(X)
    with pytest.raises(NotImplementedError, match=r"no C\+\+ compiler was found"):
        svi.step(X)


def test_instructions_are_tested_where_code_without_a_test_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.exc import CppCompileError, InductorError

    seen: list[dict[str, Any]] = []

    def compile(options: dict[str, Any]) -> Any:
        seen.append(options)
        if options.get("cpp.vec_isa_ok"):
            error = CppCompileError(["g++"], "unknown instructions")
            raise InductorError(error, inspect.currentframe())
        return Artifact()

    monkeypatch.setattr(compiler, "ASSUME_VEC_ISA", {"cpp.vec_isa_ok": True})
    compiled_once(graph(X), [X], {"a": 1}, compile)
    assert seen == [{"a": 1, "cpp.vec_isa_ok": True}, {"a": 1}]


def test_other_failures_are_not_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile(options: dict[str, Any]) -> Any:
        seen.append(options)
        raise TypeError("in a lowering")

    monkeypatch.setattr(compiler, "ASSUME_VEC_ISA", {"cpp.vec_isa_ok": True})
    with pytest.raises(TypeError, match="in a lowering"):
        compiled_once(graph(X), [X], {}, compile)
    assert len(seen) == 1


# With the real compiler.

PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from tests.training.compiled.test_artifacts import X, svi_of
svi = svi_of(engine="replay", strict=True, cache=sys.argv[1])
print([svi.step(X) for _ in range(5)] + svi.run(70, X).tolist())
"""


@pytest.mark.slow
def test_another_process_needs_no_compiler(tmp_path: Path) -> None:
    found = []
    for path in (os.environ["PATH"], "/nowhere"):
        env = {**os.environ, "PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / path[1:])}
        args = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, str(tmp_path / "cache")]
        done = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]


def losses_of(**options: Any) -> list[float]:
    svi = svi_of(**options)
    return [svi.step(X) for _ in range(5)] + [svi.step(X[:2]) for _ in range(3)]


@pytest.mark.slow
def test_trainings_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "torch._inductor.standalone_compile",
        lambda module, *args, aot, **kwargs: made.append(module) or module,
    )
    expected = losses_of(engine="eager")
    for _ in range(2):  # the second time with another guide in a cleared store
        assert losses_of(engine="flat", strict=True) == pytest.approx(expected, rel=1e-12)
    svi_of(engine="flat", strict=True).run(4, X)
    assert len(made) == 2  # one of each shape


@pytest.mark.slow
def test_trainings_share_recorded_code() -> None:
    expected = losses_of(engine="eager")
    for number in range(2):
        assert losses_of(engine="replay", strict=True) == pytest.approx(expected, rel=1e-12)
        assert len(compiler._kept) == 2, number


@pytest.mark.slow
def test_loaded_code_is_what_was_saved(tmp_path: Path) -> None:
    results = []
    for _ in range(3):  # compiled, loaded, loaded from what was loaded and saved
        x = X.clone()
        policy = CompilePolicy(ArtifactFolder(tmp_path / f"cache{len(results) // 2}"))
        with compile_policy(policy), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled = compile_graph(graph(x), [x])
        compiled(x)
        KernelCalls(compiled, [x]).repeat(2)
        results.append(x)
        if len(results) == 1:
            compiler._kept.clear()
    torch.testing.assert_close(results[0], 16.0 * X + 15.0)
    assert all(torch.equal(each, results[0]) for each in results)
