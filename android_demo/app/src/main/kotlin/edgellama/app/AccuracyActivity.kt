package edgellama.app

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.widget.Button

class AccuracyActivity : MeasureActivity(R.layout.accuracy, AccuracyScreen) {
    override val busy get() = AccuracyScreen.busy
    override val text get() = AccuracyScreen.report
    override val json get() = AccuracyScreen.json
    override val progress get() = AccuracyScreen.progress

    override val outcome: String?
        get() = when {
            AccuracyScreen.isChallenge && AccuracyScreen.json != null ->
                "challenge answered ${AccuracyScreen.responseFile(bundle)}"
            AccuracyScreen.passed == true -> "check pass ${AccuracyScreen.resultFile(bundle)}"
            AccuracyScreen.passed == false -> "check fail ${AccuracyScreen.resultFile(bundle)}"
            else -> AccuracyScreen.error?.let {
                "${if (AccuracyScreen.isChallenge) "challenge" else "check"} error ${it.replace('\n', ' ')}"
            }
        }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        view<Button>(R.id.challenge).setOnClickListener { if (!busy) pick() }
    }

    override fun open() = AccuracyScreen.open(bundle)

    override fun start() =
        if (intent.getBooleanExtra(CHALLENGE, false)) AccuracyScreen.answer() else AccuracyScreen.start()

    override fun stop() = AccuracyScreen.stop()

    private fun pick() {
        val open = Intent(OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*")
        startActivityForResult(open, PICK)
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val picked = data?.data
        if (request != PICK || result != Activity.RESULT_OK || picked == null) return
        val context = applicationContext
        AccuracyScreen.answer { Storage.importChallenge(context, picked, bundle) }
    }

    companion object {
        const val CHALLENGE = "challenge"
        private const val PICK = 1
        private const val OPEN_DOCUMENT = "android.intent.action.OPEN_DOCUMENT" // Intent's, since API 19
    }
}
