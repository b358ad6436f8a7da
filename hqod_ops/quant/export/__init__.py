"""Export of QAT models as quantized ONNX; needs ``pip install "hqod_ops[export]"``."""

from hqod_ops.quant.adapters import detection_network
from hqod_ops.quant.export.exporter import ExportReport, export_onnx
from hqod_ops.quant.export.nms import NMS
from hqod_ops.quant.export.speed import Speed, bench_export, speed_table
from hqod_ops.quant.export.verify import ExportError

__all__ = [
    "NMS",
    "ExportError",
    "ExportReport",
    "Speed",
    "bench_export",
    "detection_network",
    "export_onnx",
    "speed_table",
]
