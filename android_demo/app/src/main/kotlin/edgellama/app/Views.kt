package edgellama.app

import android.app.Activity
import android.view.View
import android.view.WindowManager

/** The view [id] of the activity's layout. Compiles against every SDK: findViewById got a type parameter in API 26. */
internal inline fun <reified T : View> Activity.view(id: Int): T {
    val found: View = findViewById(id)
    return found as T
}

internal inline fun <reified T : View> View.view(id: Int): T {
    val found: View = findViewById(id)
    return found as T
}

/** A screen that goes dark slows the processor down. */
internal fun Activity.keepScreenOn(on: Boolean) {
    val flag = WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON
    if (on) window.addFlags(flag) else window.clearFlags(flag)
}
