"""Int8 quantization of fused networks, after training (`quantize`) or during it (`calibrate_qat`, `prepare_qat_`)."""

from onefold.quantize.convert import Quantized as Quantized
from onefold.quantize.convert import quantize as quantize
from onefold.quantize.integer_model import IntegerModel as IntegerModel
from onefold.quantize.qat import calibrate_qat as calibrate_qat
from onefold.quantize.qat import prepare_qat_ as prepare_qat_
from onefold.quantize.qat import remove_qat_ as remove_qat_
from onefold.quantize.qparams import MINMAX as MINMAX
from onefold.quantize.qparams import LayerReport as LayerReport
from onefold.quantize.qparams import Method as Method
from onefold.quantize.qparams import ModelQParams as ModelQParams
