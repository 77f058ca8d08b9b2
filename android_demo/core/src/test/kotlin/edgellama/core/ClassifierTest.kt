package edgellama.core

import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import java.io.File
import kotlin.math.abs
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull
import kotlin.test.assertTrue

/** Answers with [logits], whatever it is asked. */
internal class FixedModel(private val logits: FloatArray, override val contextLength: Int = 64) : LogitsModel {
    override val vocabSize = 512
    override val outputSize = logits.size
    override val runtime = "fixed"
    val calls = ArrayList<Pair<Int, List<Int>>>()

    override fun forward(tokens: IntArray, position: Int): FloatArray {
        calls.add(position to tokens.toList())
        return logits
    }

    override fun close() = Unit
}

class ClassifierTest {
    @get:Rule
    val folder = TemporaryFolder()

    private companion object {
        const val TARGET = "xnnpack"
        const val TEXT = "Where is my parcel? <|im_end|>"
    }

    private val json = Vectors.json("classify.json")
    private val bundle = Bundle.open(File(Vectors.directory, "classifier"))
    private val tokenizer = bundle.tokenizer()

    /** Null in a list of numbers stands for NaN. */
    private fun floats(values: List<Any?>) = FloatArray(values.size) { (values[it] as Number?)?.toFloat() ?: Float.NaN }

    @Test
    fun readsTheManifest() {
        val classifier = bundle.classifier!!
        assertEquals(listOf("refund", "delivery", "other é"), classifier.labels.map { it.name })
        assertEquals(listOf(2, 1, 3), classifier.labels.map { it.rows })
        assertEquals("asks for money back", classifier.labels[0].description)
        assertEquals(6, bundle.outputSize)
        assertEquals(512, bundle.vocabSize)
        assertEquals("refund", TextClassifier.of(bundle, TARGET, tokenizer).threshold?.label)
        val other = Vectors.bundle()
        assertNull(other.classifier)
        assertEquals(512, other.outputSize)
        assertTrue("has no labels" in assertFailsWith<BundleException> { TextClassifier.of(other, TARGET, tokenizer) }.text)
    }

    @Test
    fun encodesPromptsAsPython() {
        val prompts = json.objectOf("prompts")
        val classifiers = prompts.objectOf("classifiers").entries().mapValues { (_, entry) ->
            Classifier.of(entry.objectOf("section")) to Vectors.tokenizer(entry.string("tokenizer"))
        }
        val cases = prompts.objects("cases")
        assertTrue(cases.size > 100)
        for (case in cases) {
            val (classifier, tokenizer) = classifiers.getValue(case.string("classifier"))
            val text = case.string("text")
            val about = "${case.string("classifier")}: $text"
            val encode = { classifier.encode(text, tokenizer, case.int("context_length")) }
            when (val reason = case.stringOrNull("refused")) {
                null -> assertContentEquals(case.ints("ids"), encode(), about)
                "context" -> assertFailsWith<ContextException>(about) { encode() }
                "empty" -> assertTrue("no tokens" in assertFailsWith<TokenizerException>(about) { encode() }.text)
                "unknown" -> assertTrue("pruned vocabulary" in assertFailsWith<TokenizerException>(about) { encode() }.text)
                else -> error(reason)
            }
        }
    }

    @Test
    fun answersAsPython() {
        val cases = json.objects("answers")
        assertTrue(cases.size > 20)
        for (case in cases) {
            val name = case.string("name")
            val classifier = Classifier.of(case.objectOf("classifier"))
            val judge = TextClassifier(classifier, classifier.calibration(TARGET), tokenizer, 64)
            val logits = floats(case.list("logits"))
            val expected = case.objectOrNull("answer")
            if (expected == null) {
                val error = assertFailsWith<ModelException>(name) { judge.answer(logits, 3) }
                assertTrue("no finite numbers" in error.text, error.text)
                continue
            }
            val found = judge.answer(logits, 3)
            assertEquals(expected.string("label"), found.label, name)
            assertEquals(if (expected.isNull("flagged")) null else expected.boolean("flagged"), found.flagged, name)
            assertEquals(expected.int("tokens"), found.tokens, name)
            assertEquals(classifier.labels.map { it.name }, found.probabilities.map { it.first }, name)
            val shares = expected.doubles("probabilities")
            assertEquals(shares.size, found.probabilities.size, name)
            shares.zip(found.probabilities).forEach { (e, f) -> assertTrue(abs(e - f.second) <= 1e-12, "$name: $e, ${f.second}") }
        }
    }

    @Test
    fun opensAndClassifiesWhatPythonDoes() {
        val cases = json.objects("sections")
        val raw = (Json.parse(File(Vectors.directory, "classify.json").readText()) as Map<*, *>)["sections"] as List<*>
        cases.zip(raw).forEach { (case, data) ->
            val name = case.string("name")
            val directory = copy()
            Vectors.classify(directory, (data as Map<*, *>)["classifier"], data["label_rows"])
            if (!case.boolean("opens")) {
                val error = assertFailsWith<BundleException>(name) { Bundle.open(directory) }
                assertTrue("classifier" in error.text, error.text)
            } else if (!case.boolean("classifies")) {
                val opened = Bundle.open(directory)
                assertFailsWith<BundleException>(name) { TextClassifier.of(opened, TARGET, tokenizer) }
            } else {
                TextClassifier.of(Bundle.open(directory), TARGET, tokenizer)
            }
        }
        assertTrue(cases.count { it.boolean("opens") } > 5 && cases.count { !it.boolean("opens") } > 15)
    }

    private fun copy(): File = folder.newFolder().also { File(Vectors.directory, "classifier").copyRecursively(it, true) }

    @Test
    fun readsEachTextFromTheStart() {
        val judge = TextClassifier.of(bundle, TARGET, tokenizer)
        val ids = judge.encode(TEXT).toList()
        val model = FixedModel(floatArrayOf(1f, 2f, 9f, 3f, 2f, 1f))
        val session = Session(model)
        repeat(2) { assertEquals("delivery", judge.classify(session, TEXT)?.label) }
        assertEquals(listOf(0 to ids, 0 to ids), model.calls)
        assertNull(judge.classify(session, TEXT) { true })
    }

    @Test
    fun refusesWhatDoesNotFitBeforeItRuns() {
        val judge = TextClassifier.of(bundle, TARGET, tokenizer)
        val model = FixedModel(FloatArray(6))
        val error = assertFailsWith<ContextException> { judge.classify(Session(model), "word ".repeat(99)) }
        assertTrue("context holds 64" in error.text, error.text)
        assertEquals(emptyList(), model.calls)
        for (size in listOf(5, 7, 512)) {
            val wrong = assertFailsWith<ModelException> { judge.classify(Session(FixedModel(FloatArray(size))), "a") }
            assertTrue("$size logits for 6 rows" in wrong.text, wrong.text)
        }
    }

    @Test
    fun replaysGoldenVectorsOfLabels() {
        val golden = json.objectOf("golden")
        assertEquals(golden.string("golden_sha256"), bundle.sha256("golden/golden.json"))
        for (case in golden.objects("cases")) {
            val model = VectorModel(case.double("scale"), golden.int("vocab_size"))
            val found = GoldenCheck(bundle, TARGET, case.string("processor")).run(model, tokenizer)!!
            assertEquals(case.string("verdict") == "pass", found.passed, case.string("name"))
            val expected = case.double("parity_kl_mean")
            assertTrue(abs(expected - found.parityKlMean) <= 1e-9 + 1e-6 * expected)
            assertEquals(case.double("parity_top1_agreement"), found.parityTop1, 1e-12)
        }
        val error = assertFailsWith<ModelException> { GoldenCheck(bundle, TARGET, "x86-64").run(VectorModel(0.0, 512), tokenizer) }
        assertTrue("512 logits, the manifest says 6" in error.text, error.text)
    }

    @Test
    fun answersNoChallenge() {
        val error = assertFailsWith<BundleException> { Challenge.parse("{}", "challenge.json", bundle, TARGET) }
        assertTrue("classifies texts" in error.text, error.text)
    }
}
