package edgellama.app

import android.app.Application
import android.content.ComponentCallbacks2

class DemoApplication : Application() {
    override fun onCreate() {
        super.onCreate()
        Storage.open(this)
    }

    /** The model is by far the largest thing that this process holds; it is loaded again when it is next asked. */
    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        val scarce = level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL
        if (scarce || level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND) Models.releaseWhenIdle()
    }
}
