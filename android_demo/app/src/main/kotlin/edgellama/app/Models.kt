package edgellama.app

import edgellama.core.Bundle
import edgellama.core.BundleException
import edgellama.core.Session
import edgellama.core.Tokenizer
import java.io.File

/** A bundle whose model is loaded. */
class Loaded(val bundle: Bundle, val tokenizer: Tokenizer, val session: Session, val loadMillis: Double, val modified: Long)

/** The model in memory: one at a time, loaded when it is first needed. Of the worker's thread. */
object Models {
    const val TARGET = "xnnpack"
    private var loaded: Loaded? = null

    /** The model of the bundle at [directory], its files verified. [onStep] hears what is being done. */
    fun load(directory: File, onStep: (String) -> Unit): Loaded {
        val manifest = File(directory, Bundle.MANIFEST)
        loaded?.let {
            if (it.bundle.directory == directory && it.modified == manifest.lastModified() && manifest.isFile) return it
        }
        release()
        onStep("Verifying the files…")
        val modified = manifest.lastModified()
        val bundle = Storage.bundle(directory)
        val file = bundle.file(bundle.artifact(TARGET).path)
        val tokenizer = bundle.tokenizer()
        onStep("Loading the model…")
        val start = System.nanoTime()
        val model = ExecuTorchModel(file)
        val millis = (System.nanoTime() - start) / 1e6
        val found = listOf(model.vocabSize, model.outputSize, model.contextLength)
        if (found != listOf(bundle.vocabSize, bundle.outputSize, bundle.contextLength)) {
            model.close()
            throw BundleException("${bundle.name}: the model has another vocabulary, other outputs or another context than the manifest says")
        }
        Storage.loaded(bundle)
        return Loaded(bundle, tokenizer, Session(model), millis, modified).also { loaded = it }
    }

    /** Gives the memory back. */
    fun release() {
        loaded?.session?.model?.close()
        loaded = null
    }

    /** Gives the memory back as soon as nothing runs; may be called from any thread. */
    fun releaseWhenIdle() = Worker.run({ }) { release() }
}
