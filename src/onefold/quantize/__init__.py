"""Int8 quantization of fused networks, after training (`quantize`) or during it (`calibrate_qat`, `prepare_qat_`)."""

from onefold.quantize.convert import QuantizedModel as QuantizedModel
from onefold.quantize.convert import quantize as quantize
from onefold.quantize.integer_model import IntegerModel as IntegerModel
from onefold.quantize.qat import calibrate_qat as calibrate_qat
from onefold.quantize.qat import prepare_qat_ as prepare_qat_
from onefold.quantize.qat import remove_qat_ as remove_qat_
from onefold.quantize.qparams import MINMAX_METHOD as MINMAX_METHOD
from onefold.quantize.qparams import LayerError as LayerError
from onefold.quantize.qparams import ModelQParams as ModelQParams
from onefold.quantize.qparams import QuantizationMethod as QuantizationMethod
