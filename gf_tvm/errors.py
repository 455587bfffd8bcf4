"""The exceptions of gf_tvm. The command line prints their message as one line and exits with code 2."""


class GfTvmError(Exception):
    """Base class: something the caller can put right. The message names the value and what would be right."""


class GeometryError(GfTvmError, ValueError):
    """Shapes, strides, patches or dtypes that do not describe a filtered convolution."""


class DerivativeError(GfTvmError):
    """A derivative of a filtered convolution that is not defined: any second one."""


class DeviceError(GfTvmError):
    """An unknown device profile, or one that this machine cannot run or compile for."""


class LogError(GfTvmError):
    """A tuning log that cannot be read, cannot be written, or was made for something else."""


class BundleError(GfTvmError):
    """A bundle that is damaged, unsafe, or made for another machine or version."""


class BuildError(GfTvmError):
    """A kernel that could not be scheduled, compiled or linked."""


class CacheError(GfTvmError):
    """A cache of kernels that cannot be used, or a setting of it that says nothing sensible."""


class ModelError(GfTvmError, ValueError):
    """A model, layer selection or data set that cannot be used as asked."""


class PictureError(ModelError):
    """A file that is no picture, or one that cannot be shown as it is."""


class FarmError(GfTvmError):
    """A tracker, server or board that cannot be used as asked."""


class ReportError(GfTvmError, ValueError):
    """A file of results that cannot be reported, or a report that cannot be written."""
