package edgellama.app

import edgellama.core.ModelException

/** Error codes of ExecuTorch (runtime/core/error.h) as sentences. */
object ExecuTorchErrors {
    private const val EXPORT = "Export the bundle with the version of ExecuTorch that this app has."
    private const val COPY = "Copy the bundle to the device again."
    private const val MEMORY = "Close other apps, or use a smaller model or a shorter context."

    private val SENTENCES = mapOf(
        0x02 to ("the model is in a state in which this cannot be done" to "Close the model and load it again."),
        0x10 to ("this build does not support what the model asks for" to EXPORT),
        0x11 to ("the model uses something that is not implemented" to EXPORT),
        0x12 to ("the model refused its inputs" to "Export the bundle again; its shapes are not what the manifest says."),
        0x13 to ("the model got inputs of another type" to EXPORT),
        0x14 to ("an operator of the model is missing in this app" to "Use the executorch-android that edgellama pins."),
        0x20 to ("a file or method was not found" to COPY),
        0x21 to ("there is not enough memory" to MEMORY),
        0x22 to ("the model's file cannot be read" to COPY),
        0x23 to ("the file is no program of this version of ExecuTorch" to EXPORT),
        0x24 to ("data beside the program is damaged" to COPY),
        0x25 to ("there is not enough memory" to MEMORY),
        0x30 to ("the delegate in the file is of another version" to EXPORT),
        0x31 to ("there is not enough memory for the delegate" to MEMORY),
        0x32 to ("the delegate is not in this app" to "Use the executorch-android package with XNNPACK."),
    )

    fun translate(action: String, code: Int, cause: Throwable): ModelException {
        val (reason, remedy) = SENTENCES[code] ?: ("it failed for a reason of its own" to EXPORT)
        val number = "0x${code.toString(16)}"
        return ModelException("ExecuTorch cannot $action: $reason (error $number)", remedy, cause)
    }
}
