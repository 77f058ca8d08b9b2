package edgellama.app

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import android.os.PowerManager
import edgellama.core.Device
import edgellama.core.Processor
import java.io.File

/** What the device says about itself. */
object Phone {
    val device = Device(
        "${Build.MANUFACTURER} ${Build.MODEL}".trim().ifEmpty { "unknown" },
        "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})",
    )

    /** The processor; null where the kernel does not tell. */
    private val processor: Processor? by lazy {
        try {
            Processor.of(File(Processor.FILE).readText())
        } catch (_: java.io.IOException) {
            null
        }
    }

    /** A sentence about a processor that the libraries may not run on; null for all others. */
    val processorWarning: String? get() = processor?.warning

    /** The kind of the processor ([Processor.kind]). Where the kernel does not tell, that of most phones. */
    val processorKind: String get() = processor?.kind ?: Processor(arm = true, atomics = true, dotProduct = true).kind

    /** Bytes of this process in memory at most so far; null where the kernel does not tell. */
    fun peakBytes(): Long? = status("VmHWM")

    /** Bytes of this process in memory. */
    fun usedBytes(): Long? = status("VmRSS")

    /** Free and whole memory of the device in bytes. */
    fun memory(context: Context): Pair<Long, Long> {
        val info = ActivityManager.MemoryInfo()
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(info)
        return info.availMem to info.totalMem
    }

    /** How hot the device is: 0 (not at all) to 6 (shutting down); null before Android 10. */
    fun thermalStatus(context: Context): Int? =
        if (Build.VERSION.SDK_INT < THERMAL_API) null
        else (context.getSystemService(Context.POWER_SERVICE) as PowerManager).currentThermalStatus

    private const val THERMAL_API = 29

    private fun status(name: String): Long? = try {
        File("/proc/self/status").readLines().firstOrNull { it.startsWith("$name:") }
            ?.filter { it.isDigit() }?.toLongOrNull()?.times(1024)
    } catch (_: java.io.IOException) {
        null
    }
}

fun megabytes(bytes: Long?): String = if (bytes == null) "unknown" else "${bytes / 1_000_000} MB"

fun perSecond(rate: Double?): String = if (rate == null) "–" else "%.1f tok/s".format(rate)
