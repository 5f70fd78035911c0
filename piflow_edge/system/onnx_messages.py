"""The messages of an ONNX file: numbers, wire types and names as onnx.proto has them."""

from piflow_edge.system.protobuf import Message

MODEL = Message.parse(
    "ModelProto",
    "1v ir_version, 2b producer_name, 3b producer_version, 4b domain, 5v model_version, 6b doc_string, 7b graph, "
    "8b* opset_import, 14b* metadata_props, 20b* training_info, 25b* functions, 26b* configuration",
)
GRAPH = Message.parse(
    "GraphProto",
    "1b* node, 2b name, 5b* initializer, 10b doc_string, 11b* input, 12b* output, 13b* value_info, "
    "14b* quantization_annotation, 15b* sparse_initializer, 16b* metadata_props",
)
NODE = Message.parse(
    "NodeProto",
    "1b* input, 2b* output, 3b name, 4b op_type, 5b* attribute, 6b doc_string, 7b domain, 8b overload, "
    "9b* metadata_props, 10b* device_configurations",
)
ATTRIBUTE = Message.parse(
    "AttributeProto",
    "1b name, 2f f, 3v i, 4b s, 5b t, 6b g, 7f* floats, 8v* ints, 9b* strings, 10b* tensors, 11b* graphs, "
    "13b doc_string, 14b tp, 15b* type_protos, 20v type, 21b ref_attr_name, 22b sparse_tensor, 23b* sparse_tensors",
)
TENSOR = Message.parse(
    "TensorProto",
    "1v* dims, 2v data_type, 3b segment, 4f* float_data, 5v* int32_data, 6b* string_data, 7v* int64_data, 8b name, "
    "9b raw_data, 10d* double_data, 11v* uint64_data, 12b doc_string, 13b* external_data, 14v data_location, "
    "16b* metadata_props",
)
SPARSE_TENSOR = Message.parse("SparseTensorProto", "1b values, 2b indices, 3v* dims")
FUNCTION = Message.parse(
    "FunctionProto",
    "1b name, 4b* input, 5b* output, 6b* attribute, 7b* node, 8b doc_string, 9b* opset_import, 10b domain, "
    "11b* attribute_proto, 12b* value_info, 13b overload, 14b* metadata_props",
)
TRAINING = Message.parse(
    "TrainingInfoProto",
    "1b initialization, 2b algorithm, 3b* initialization_binding, 4b* update_binding",
)
OPERATOR_SET = Message.parse("OperatorSetIdProto", "1b domain, 2v version")
ENTRY = Message.parse("StringStringEntryProto", "1b key, 2b value")
VALUE = Message.parse("ValueInfoProto", "1b name, 2b type, 3b doc_string, 4b* metadata_props")
TYPE = Message.parse(
    "TypeProto",
    "1b tensor_type, 4b sequence_type, 5b map_type, 6b denotation, 7b opaque_type, 8b sparse_tensor_type, "
    "9b optional_type",
)
TENSOR_TYPE = Message.parse("TypeProto.Tensor", "1v elem_type, 2b shape")
SHAPE = Message.parse("TensorShapeProto", "1b* dim")
DIMENSION = Message.parse("TensorShapeProto.Dimension", "1v dim_value, 2b dim_param, 3b denotation")

# TensorProto.DataType -> bits of one value. Text, type 8, has no fixed size.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip

# TensorProto.DataType -> NumPy's name, or that of ml_dtypes.
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
# Such a name -> bytes of one value.
ITEM_BYTES = {name: BITS[code] // 8 for code, name in DTYPES.items()}
