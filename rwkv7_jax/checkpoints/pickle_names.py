"""The names that the pickle of a PyTorch checkpoint may use.

They are the names that `torch.load(weights_only=True)` accepts and that occur in checkpoints. None
is ever imported; `restricted_unpickler` interprets them.
Source: pytorch/pytorch@v2.13.0 torch/_weights_only_unpickler.py, `_get_allowed_globals`.
"""

import ml_dtypes
import numpy as np

# The dtype of each of PyTorch's storage classes.
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")

# A tensor with attributes. The arguments are the rebuild function, the class, that function's
# arguments and the attributes.
REBUILD_WITH_ATTRIBUTES = ("torch._tensor", "_rebuild_from_type_v2")

REBUILD_PARAMETERS = (
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
)

ORDERED_DICT = ("collections", "OrderedDict")

COUNTER = ("collections", "Counter")

# For newer dtypes, which have no storage class; the dtype is the seventh argument.
REBUILD_OF_DTYPE = ("torch._utils", "_rebuild_tensor_v3")

# Kinds of tensors whose data is not read, by the function that rebuilds them.
OTHER_TENSORS = {
    ("torch._utils", "_rebuild_sparse_tensor"): "sparse",
    ("torch._utils", "_rebuild_qtensor"): "quantised",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "meta",
}

# Storages whose data is not read, and the dtype of their tensors.
OTHER_STORAGES = {
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "UntypedStorage": "untyped",
}

SEQUENCES = (("torch", "Size"), ("builtins", "set"), ("__builtin__", "set"))

_OPAQUE_BUILTINS = ("bytes", "bytearray", "complex")

# Calls whose result is not needed; the result stays the name of the function.
OPAQUE_CALLS = {
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("_codecs", "encode"),
    *(("builtins", name) for name in _OPAQUE_BUILTINS),
    *(("__builtin__", name) for name in _OPAQUE_BUILTINS),
}

# Dtypes and quantisation schemes, which are values, not functions.
_DTYPES = """float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2
float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 complex32 complex64 complex128 bool uint8 uint16
uint32 uint64 int8 int16 int32 int64 qint8 qint32 quint8 quint4x2 quint2x4 per_tensor_affine
per_channel_affine per_tensor_symmetric per_channel_symmetric""".split()

# An allowlist, because a list of dangerous names would never be complete.
ALLOWED_NAMES = {
    *SEQUENCES,
    REBUILD_TENSOR,
    REBUILD_WITH_ATTRIBUTES,
    *REBUILD_PARAMETERS,
    ORDERED_DICT,
    COUNTER,
    REBUILD_OF_DTYPE,
    *OTHER_TENSORS,
    *OPAQUE_CALLS,
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", name) for name in (*STORAGES, *OTHER_STORAGES, *_DTYPES)),
}
