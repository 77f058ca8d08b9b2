package edgellama.app

import android.os.Handler
import android.os.Looper
import edgellama.core.EdgeLlamaException
import java.io.IOException
import java.util.concurrent.Executors

/** The one thread that loads and runs models. What it finds out is told on the main thread, in order. */
object Worker {
    private val thread = Executors.newSingleThreadExecutor { Thread(it, "edgellama") }
    private val main = Handler(Looper.getMainLooper())

    /** Runs [work] after what was asked before. [failed] hears, on the main thread, why it could not be done. */
    fun run(failed: (String) -> Unit, work: () -> Unit) {
        thread.execute {
            try {
                work()
            } catch (error: EdgeLlamaException) {
                tell { failed(error.text) }
            } catch (error: IOException) {
                tell { failed("A file cannot be read or written (${error.message}).\nCheck the free space of the device.") }
            } catch (error: OutOfMemoryError) {
                Models.release()
                tell { failed("This device has not enough free memory for the model.\nClose other apps, or use a smaller model.") }
            }
        }
    }

    /** Runs [update] on the main thread. */
    fun tell(update: () -> Unit) {
        main.post(update)
    }
}

/** One thing that was asked for. Once stopped, what it still tells is not heard. */
class Run {
    @Volatile
    var stopped = false
}

/** What an activity shows, kept apart from it so that rotation loses nothing. Of the main thread only. */
abstract class Screen {
    private var observer: (() -> Unit)? = null

    /** What runs now. */
    protected var run: Run? = null

    val busy: Boolean get() = run != null

    /** Why the last thing that was asked failed. */
    var error: String? = null
        protected set

    fun observe(observer: () -> Unit) {
        this.observer = observer
        observer()
    }

    fun release() {
        observer = null
    }

    /** Lets go of what runs: it ends by itself, soon, and changes nothing here any more. */
    protected fun abandon() {
        run?.stopped = true
        run = null
    }

    /** Runs [update] on the main thread, unless [of] is no longer what runs. */
    protected fun tell(of: Run, update: () -> Unit) = Worker.tell { if (of === run) update() }

    protected fun changed() {
        observer?.invoke()
    }
}
