"""Passes: graph to graph, one pass a file, and nothing else.

Recipes put them in order; users may call one alone. A pass finds its sites by structure and takes
arithmetic from numerics, questions from structure, checks from pipeline.
"""

from fxquant.passes.attn8 import Attn8 as Attn8
from fxquant.passes.awq import Awq as Awq
from fxquant.passes.calibrate import Calibrate as Calibrate
from fxquant.passes.clip import Clip as Clip
from fxquant.passes.correct_bias import CorrectBias as CorrectBias
from fxquant.passes.decompose_attention import DecomposeAttention as DecomposeAttention
from fxquant.passes.equalize import Equalize as Equalize
from fxquant.passes.fold_norms import FoldNorms as FoldNorms
from fxquant.passes.fp32_gemm import Fp32Gemm as Fp32Gemm
from fxquant.passes.fuse_fp8 import FuseFp8 as FuseFp8
from fxquant.passes.fuse_kernels import FuseKernels as FuseKernels
from fxquant.passes.gptq import Gptq as Gptq
from fxquant.passes.integerize import Integerize as Integerize
from fxquant.passes.kv4 import Kv4 as Kv4
from fxquant.passes.kv8 import Kv8 as Kv8
from fxquant.passes.name_sites import NameSites as NameSites
from fxquant.passes.observe import Observe as Observe
from fxquant.passes.quantize import Quantize as Quantize
from fxquant.passes.refine import Refine as Refine
from fxquant.passes.rotate import Rotate as Rotate
from fxquant.passes.rotate_inputs import RotateInputs as RotateInputs
from fxquant.passes.smooth import Smooth as Smooth
from fxquant.passes.split_outliers import SplitOutliers as SplitOutliers
