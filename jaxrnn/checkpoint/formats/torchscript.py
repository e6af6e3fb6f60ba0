"""TorchScript archives, as torch.jit.save writes them: the weights, and the settings in the code, which never runs."""

import functools
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, check_unicode, listed
from jaxrnn.checkpoint.formats import script_code
from jaxrnn.checkpoint.formats.pickle_machine import Refused, build
from jaxrnn.checkpoint.formats.pickles import Other, Packed, StoredTensor, TorchSave, is_tensor
from jaxrnn.checkpoint.formats.quantized import BEFORE, Plan
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.formats.recurrent_calls import Said
from jaxrnn.checkpoint.formats.script_code import CONSTANTS, Class, CodeCall
from jaxrnn.checkpoint.formats.torch_archive import Archive
from jaxrnn.checkpoint.named import CannotRun, Described, Names, Origin
from jaxrnn.checkpoint.stored import Value

EXPORT = "export its tensors: torch.save(torch.jit.load(path).state_dict(), new_path)"
_RENAME = "give one of the two attributes another name in torch"
_FREEZE = "rename them as your module has them, or save state_dict() before torch.jit.freeze"
_BESIDE = "if they matter, read them with jaxrnn.checkpoint.load_tree(path)"

_LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("tensor", "int", "double", "bool")}
_TAG = "torch.jit._pickle.restore_type_tag"
_PACKED = ("__torch__.torch.classes.quantized.LinearPackedParamsBase", "__torch__.torch.classes.rnn.CellParamsBase")
_TORCH_BIND = "__torch__.torch.classes."  # classes of C++
_DEEPEST = 100  # modules in modules
# Characters in the names of attributes, counted as often as modules are reached: a small file may share modules so that
# it has billions. Each attribute counts as a hundred more.
_MOST, _EACH = 1 << 25, 100
_MOST_CALLS = 200_000  # and weights in them
_LAYERS = "_all_weight_values"  # of quantized layers
_STATE = "__getstate__"  # what a class restores itself from, if not from attributes
_PLAIN = (bool, int, float, str)


class ScriptObject(dict[str, Any]):
    """An object of a class of the archive: its attributes, by name.

    Attributes:
        kind: the class's name.
        depth: how deep objects are nested in it.
    """

    __slots__ = ("depth", "kind")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind: str = sys.intern(kind)
        self.depth: int = 0


class _Script(TorchSave):
    """The globals in TorchScript's pickles. Classes of the archive are names, too."""

    def __init__(self, folder: str, dequantize: bool) -> None:
        super().__init__(folder=folder)
        self.dequantize = dequantize

    def knows(self, name: str) -> bool:
        return name.startswith("__torch__.") or name in _LISTS or name == _TAG or super().knows(name)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in _LISTS:
            [items] = arguments
            return items
        if name == _TAG:
            value, _type = arguments
            return value
        if name.startswith("__torch__."):  # a member of an enumeration
            [value] = arguments
            return value
        return super().call(name, arguments)

    def bare(self, name: str, argument: Any) -> tuple[Any, ...]:
        if not name.startswith("__torch__."):
            return super().bare(name, argument)
        return (argument,)  # the value of a member of an enumeration

    def makes(self, name: str) -> bool:
        return name.startswith("__torch__.")

    def new(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if arguments:
            raise ValueError("an object is made of something, and not of its state")
        if name not in _PACKED or not self.dequantize:
            return ScriptObject(name)
        made = Packed()
        made.kind = name
        return made

    def build(self, value: Any, state: Any) -> None:
        if type(value) is Packed:
            value.state = state, value.kind
        elif type(value) is not ScriptObject:
            super().build(value, state)
        elif type(state) is dict and all(type(name) is str for name in state):
            value.update(state)
            value.depth = 1 + max((each.depth for each in state.values() if type(each) is ScriptObject), default=0)
            if value.depth > _DEEPEST:
                raise Refused(f"its modules are nested more than {_DEEPEST} deep")
        else:
            value[_STATE] = state


def is_one(archive: Archive) -> bool:
    return "constants.pkl" in archive.entries


def tree(archive: Archive, left_out: set[str] | None = None) -> Any:
    """What an archive's pickles hold: an object has its attributes, like a dict; the model has the constants, too."""
    root = _unpickled(archive, "data", left_out, False)
    constants = _Constants(_unpickled(archive, "constants", left_out, False)).tensors
    if type(root) is ScriptObject and constants:
        if CONSTANTS in root:
            cause = f"the model has an attribute {CONSTANTS}, which is also the name of the code's constants"
            raise CheckpointError(f"{cause}\n{_RENAME}")
        root[CONSTANTS] = {name.partition(".")[2]: tensor for name, tensor in constants.items()}
    return root


def _unpickled(archive: Archive, name: str, left_out: set[str] | None, dequantize: bool) -> Any:
    """What `name`.pkl holds, whose numbers are in the folder `name`."""
    if f"{name}.pkl" not in archive.entries:
        raise CheckpointError(f"damaged: a TorchScript archive without its {name}.pkl\n{AGAIN}")
    try:
        return build(archive.text(f"{name}.pkl"), _Script(name, dequantize), left_out)
    except Refused as refusal:
        raise CheckpointError(f"a TorchScript archive that is not read: {refusal}\n{EXPORT}") from refusal


def read(archive: Archive, what: Reading) -> tuple[Described, list[tuple[str, str]]]:
    """The tensors of `state_dict()`, and what to warn of, with remedies.

    A model after torch.jit.freeze has none. Then the tensors are those of its attributes and constants, with torch's
    names for recurrent weights.
    """
    what.check_no_key("a TorchScript archive")
    left_out: set[str] | None = set() if what.only_tensors else None
    model = _Model(archive, _unpickled(archive, "data", left_out, what.dequantize))
    frozen = _Constants(_unpickled(archive, "constants", left_out, what.dequantize))
    said, calls = Said(), list(model.calls())
    for prefix, call in calls:
        model.resolve(prefix, call, frozen, said)
    words = [(f"left out objects that are not tensors: {listed(sorted(left_out))}", "")] if left_out else []
    tensors = Names[Any](_RENAME)
    for some in (model.tensors, frozen.weights):
        for name, tensor in some.items():
            tensors.put(name, tensor, name)
    rest = {name: tensor for name, tensor in frozen.tensors.items() if name not in frozen.used}
    if frozen.weights:
        words.append(
            (f"frozen: its weights have no names; its code gave these modules theirs: {listed(frozen.titles)}", _FREEZE)
        )
    if not model.tensors:
        for name, tensor in (*model.beside.items(), *rest.items()):
            tensors.put(name, tensor, name)
    else:
        left = model.beside | rest
        if large := [name for name, tensor in left.items() if isinstance(tensor, Other) or tensor.numel > 1]:
            words.append((f"left out tensors that are neither parameters nor buffers: {listed(large)}", _BESIDE))
        if small := [name for name in left if name not in large]:
            what.note(f"left out numbers that are neither parameters nor buffers: {listed(small)}")
    plan = Plan.of(tensors, model.directions()) if what.dequantize else Plan(dict(tensors))
    arrays, more = plan.dequantized(archive.arrays(plan.stored))
    for name in arrays:
        check_unicode(name)
    model.settings(arrays, said)
    words += [*((text, "") for text in more), *said.words]
    settings = said.settings()
    origins = {}
    for prefix, (module, _) in model.modules.items():
        if f"{prefix}weight_hh" in arrays or f"{prefix}weight_hh_l0" in arrays:
            run = functools.partial(_run, archive.path, prefix, bool(settings.get(prefix, {}).get("batch_first")))
            origins[prefix] = Origin(f"TorchScript's {module.kind.rpartition('.')[2]}", {}, run, runs_code=True)
    return Described(arrays, settings, [prefix.removesuffix(".") for prefix in model.modules], origins), words


def _run(path: str, prefix: str, batch_first: bool, x: Any, states: Any) -> list[Any]:
    """Run a module's own code: see `named.Origin`."""
    torch = importlib.import_module("torch")
    swap = batch_first and x.ndim > 2
    given = torch.tensor(x.swapaxes(0, 1) if swap else x)
    hx = tuple(map(torch.tensor, states))
    try:
        model = torch.jit.load(path, map_location="cpu").double().eval()
        module = dict(model.named_modules())[prefix.removesuffix(".")]
        # torch's layers have several methods, by what they are given.
        forward = getattr(module, "forward__0", None) or module.forward
        with torch.no_grad():
            returned = forward(given, hx if len(hx) > 1 else hx[0])
    except RuntimeError as error:  # of a module that was traced with other arguments, or a file that this torch refuses
        raise CannotRun from error
    output, state = returned if x.ndim > 2 else (None, returned)
    found = [each.numpy() for each in (state if isinstance(state, tuple) else (state,))]
    if output is None:
        return found
    return [output.numpy().swapaxes(0, 1) if swap else output.numpy(), *found]


class _Model:
    """The modules of an archive, by the prefixes of their attributes.

    Attributes:
        modules: each with its class.
        tensors: parameters and buffers, and packed weights of quantized modules.
        beside: other tensors among the attributes.
    """

    def __init__(self, archive: Archive, root: Any) -> None:
        self._archive = archive
        self._calls = 0
        self._code: dict[str, dict[str, Class]] = {}
        self.modules: dict[str, tuple[ScriptObject, Class]] = {}
        self.tensors = Names[Any](_RENAME)
        self._others = Names[Any](_RENAME)
        if type(root) is not ScriptObject or not self._class(root.kind, "the model").is_module:
            raise CheckpointError(f"a TorchScript archive whose data is not a module\n{EXPORT}")
        self._walk(root)
        own = {each for each in self.tensors.values() if type(each) is StoredTensor}
        self.beside = {
            name: each for name, each in self._others.items() if type(each) is not StoredTensor or each not in own
        }

    def _class(self, kind: str, prefix: str) -> Class:
        """What the code says of a class such as __torch__.torch.nn.modules.rnn.___torch_mangle_0.LSTM."""
        module, _, name = kind.rpartition(".")
        path = f"code/{module.replace('.', '/')}.py"
        if path not in self._code:
            text = self._archive.text(path) if path in self._archive.entries else b""
            self._code[path] = script_code.classes(text.decode("utf-8", "replace"))
        if name not in self._code[path]:
            raise CheckpointError(f"damaged: {prefix} is a {kind}, and the archive has no code of it\n{AGAIN}")
        return self._code[path][name]

    def _walk(self, root: ScriptObject) -> None:
        """Fill the attributes, without recursion: a file decides how deep modules go, and how often they are shared."""
        left: list[tuple[str, int, Any, Class]] = [("", 0, root, self._class(root.kind, "the model"))]
        names = 0
        while left:
            prefix, depth, module, known = left.pop()
            names += sum(len(prefix) + len(name) + _EACH * (1 + _held(value)) for name, value in module.items()) + _EACH
            if depth > _DEEPEST or names > _MOST:
                limit = f"are nested more than {_DEEPEST} deep" if depth > _DEEPEST else "have too many attributes"
                raise CheckpointError(f"its modules {limit}\n{EXPORT}")
            if _STATE in module:
                cause = f"{prefix[:-1] or 'the model'} is a {module.kind}, which its own code restores"
                raise CheckpointError(f"{cause}: __setstate__ is not run\n{EXPORT}")
            self.modules[prefix] = module, known
            below: list[tuple[str, int, Any, Class]] = []
            for own in (known.parameters, known.buffers):
                for name, value in module.items():
                    if name in own and is_tensor(value):
                        self.tensors.put(prefix + name, value, f"{name} of the {module.kind}")
            for name, value in module.items():
                if type(value) is Packed:
                    self.tensors.put(prefix + name, value, f"{name} of the {module.kind}")
                elif name not in known.parameters and name not in known.buffers:
                    self._put_beside(prefix + name, _inside(value))
                if type(value) is not ScriptObject:
                    continue
                if value.kind.startswith(_TORCH_BIND):
                    self._refuse_packed(prefix + name, value.kind)
                elif (kind := self._class(value.kind, prefix + name)).is_module:
                    below.append((f"{prefix}{name}.", depth + 1, value, kind))
                else:
                    self._put_beside(prefix + name, _inside({**value}))
            left += reversed(below)

    def _put_beside(self, name: str, inside: Iterator[tuple[str, Any]]) -> None:
        for path, tensor in inside:
            self._others.put(name + path, tensor, f"a tensor in {name}")

    def _refuse_packed(self, name: str, kind: str) -> None:
        if kind in _PACKED:
            cause = f"a quantized model, whose weights are packed by torch's own code: {name} is a {kind}"
            raise CheckpointError(
                f"{cause}\nread its rounded weights: dequantize=True, or --dequantize on the command line"
            )
        raise CheckpointError(f"{name} is a {kind}, which only torch's own code reads\n{BEFORE}")

    def calls(self) -> Iterator[tuple[str, CodeCall]]:
        """The calls in the code of each module, with its prefix."""
        return ((prefix, call) for prefix, (_, known) in self.modules.items() for call in known.calls)

    def resolve(self, prefix: str, call: CodeCall, constants: "_Constants", said: Said) -> None:
        """Find the weights of a call in the module with a prefix, and take its settings."""
        paths = call.weights
        if all(path[:1] == (CONSTANTS,) for path in paths):
            if names := constants.named(call, self.modules):
                said.add_call(call.call, names, {name: constants.weights[name] for name in names})
            return
        names = [prefix + ".".join(path) for path in paths]
        if not any(paths):  # all are arguments of the method: of a traced module that is called twice
            names = [prefix + name for name in call.call.names(len(paths))]
            if self.modules[prefix][1].parameters != {name.removeprefix(prefix) for name in names}:
                return
        elif len(names) == 1:  # the list of a module's weights
            owner, _, leaf = names[0].rpartition(".")
            owner = f"{owner}." if owner else ""
            if leaf != "_flat_weights" or owner not in self.modules:
                return
            value = self.modules[owner][0].get(leaf)
            names = [owner + name for name in call.call.names(len(value) if type(value) is list else 0)]
        self._calls += 1 + len(names)
        if self._calls > _MOST_CALLS:
            raise CheckpointError(f"its modules call recurrent layers more than {_MOST_CALLS} times\n{EXPORT}")
        if names and all(name in self.tensors for name in names):
            said.add_call(call.call, names, self.tensors)

    def directions(self) -> dict[str, int]:
        """In how many directions quantized layers go, by their prefixes."""
        return {
            prefix: 1 + module["bidirectional"]
            for prefix, (module, _) in self.modules.items()
            if _LAYERS in module and type(module.get("bidirectional")) is bool
        }

    def settings(self, arrays: Mapping[str, Value], said: Said) -> None:
        """Take the settings that classes and their objects have."""
        owned: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, array in arrays.items():
            path, dot, leaf = name.rpartition(".")
            owned.setdefault(path + dot, {})[leaf] = array.shape
        for prefix, (module, known) in self.modules.items():
            shapes = owned.get(prefix, {})
            settings = known.settings | {name: value for name, value in module.items() if type(value) in _PLAIN}
            if module.kind.endswith(".RNNCell") and "nonlinearity" not in settings and len(known.activations) == 1:
                settings["nonlinearity"] = next(iter(known.activations))  # traced
            said.add_module(prefix, settings, shapes)


class _Constants:
    """The constants of the code, in which a frozen model has its weights.

    Attributes:
        tensors: all, under the names that the code has for them.
        weights: those of recurrent modules, by torch's names below a prefix.
        used: the constants that are among these.
        titles: the prefixes.
    """

    def __init__(self, constants: Any) -> None:
        if not isinstance(constants, tuple | list):
            raise CheckpointError(
                f"damaged: its constants should be a tuple, and are a {type(constants).__name__}\n{AGAIN}"
            )
        self.tensors = {f"{CONSTANTS}.c{index}": each for index, each in enumerate(constants) if is_tensor(each)}
        self.weights: dict[str, Any] = {}
        self.used: set[str] = set()
        self._named: dict[tuple[str, ...], str] = {}

    @property
    def titles(self) -> list[str]:
        return [prefix.removesuffix(".") for prefix in self._named.values()]

    def named(self, call: CodeCall, modules: Iterable[str]) -> list[str]:
        """The names of the weights of a call, below none of the prefixes of modules; nothing if they are not there."""
        names = call.call.names(len(call.weights))
        keys = tuple(".".join(path) for path in call.weights)
        if not names or any(key not in self.tensors for key in keys):
            return []
        if keys not in self._named:
            title = re.fullmatch(r"self_(\w+?)__flat_weights", call.title)
            base = title[1] if title else call.call.op + "_cell" * call.call.is_cell
            taken, number, prefix = {*self._named.values(), *modules}, 2, f"{base}."
            while prefix in taken:
                prefix, number = f"{base}_{number}.", number + 1
            self._named[keys] = prefix
            self.weights |= {prefix + name: self.tensors[key] for name, key in zip(names, keys, strict=True)}
            self.used.update(keys)
        return [self._named[keys] + name for name in names]


def _held(value: Any) -> int:
    return len(value) if type(value) in (list, tuple, dict) else 0


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors in an attribute: itself, or those in a list or a dict, with what to add to its name."""
    if is_tensor(value):
        yield "", value
    elif type(value) in (list, tuple, dict):
        items = value.items() if type(value) is dict else enumerate(value)
        yield from ((f".{key}", each) for key, each in items if is_tensor(each))
