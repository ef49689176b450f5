"""The Open Inference Protocol (KServe v2): Triton clients talk to the router as they would to an LLM backend of Triton.

tensors.py  one tensor: datatype, shape and content -> Python values
request.py  named tensors -> a request of ours, and what the client wants back
wire.py     messages <-> these
service.py  GRPCInferenceService: one life cycle with GenerateService, other words
"""
