package edgellama.app

import edgellama.core.LogitsModel
import edgellama.core.ModelException
import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecutorchRuntimeException
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import java.io.File

/**
 * A .pte in ExecuTorch: forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, V]. V is
 * the size of the vocabulary, or the number of rows of a classifier's labels.
 *
 * `Module` is used and not `LlmModule`, which has a tokenizer and a sampler of its own and gives no logits. Only
 * members that versions 1.0 to 1.5 share are called.
 */
class ExecuTorchModel(file: File) : LogitsModel {
    private val module: Module = translated("load it") { Module.load(file.path, Module.LOAD_MODE_MMAP) }

    override val vocabSize: Int
    override val outputSize: Int
    override val contextLength: Int
    override val runtime = "executorch-android"

    init {
        try {
            vocabSize = constant("get_vocab_size")
            contextLength = constant("get_max_context_len")
            outputSize = forward(intArrayOf(0), 0).size // packs the weights too, which belongs to loading
        } catch (error: ModelException) {
            close()
            throw error
        }
    }

    override fun forward(tokens: IntArray, position: Int): FloatArray = translated("run it") {
        val ids = LongArray(tokens.size) { tokens[it].toLong() }
        val inputs = EValue.from(Tensor.fromBlob(ids, longArrayOf(1, ids.size.toLong())))
        val at = EValue.from(Tensor.fromBlob(longArrayOf(position.toLong()), longArrayOf(1)))
        module.execute("forward", inputs, at)[0].toTensor().dataAsFloatArray
    }

    override fun close() = module.destroy()

    private fun constant(method: String): Int = translated("read $method") { module.execute(method)[0].toInt().toInt() }
}

/** Runs [block]; what ExecuTorch throws becomes a sentence and what to do about it. */
private fun <T> translated(action: String, block: () -> T): T {
    try {
        return block()
    } catch (error: ExecutorchRuntimeException) {
        throw ExecuTorchErrors.translate(action, error.errorCode, error)
    } catch (error: IllegalArgumentException) {
        throw ExecuTorchErrors.translate(action, 0x12, error)
    } catch (error: IllegalStateException) {
        throw ModelException("ExecuTorch cannot $action: ${error.message}", "Close the model and load it again.", error)
    } catch (error: UnsatisfiedLinkError) {
        throw ModelException(
            "ExecuTorch has no code for this processor (${error.message})",
            "The app is built for arm64-v8a and x86_64; use a device with one of them.",
            error,
        )
    }
}
