package edgellama.app

class AccuracyActivity : MeasureActivity(R.layout.accuracy, AccuracyScreen) {
    override val busy get() = AccuracyScreen.busy
    override val text get() = AccuracyScreen.report
    override val json get() = AccuracyScreen.json
    override val progress get() = AccuracyScreen.progress

    override val outcome: String?
        get() = when (AccuracyScreen.passed) {
            true -> "check pass ${AccuracyScreen.resultFile(bundle)}"
            false -> "check fail ${AccuracyScreen.resultFile(bundle)}"
            null -> AccuracyScreen.error?.let { "check error ${it.replace('\n', ' ')}" }
        }

    override fun open() = AccuracyScreen.open(bundle)

    override fun start() = AccuracyScreen.start()

    override fun stop() = AccuracyScreen.stop()
}
