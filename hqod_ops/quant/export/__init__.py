"""Export of QAT models as quantized ONNX; needs ``pip install "hqod_ops[export]"``."""

from hqod_ops.quant.adapters import detection_network
from hqod_ops.quant.export.exporter import ExportReport, export_onnx
from hqod_ops.quant.export.nms import NMS
from hqod_ops.quant.export.verify import ExportError

__all__ = ["NMS", "ExportError", "ExportReport", "detection_network", "export_onnx"]
