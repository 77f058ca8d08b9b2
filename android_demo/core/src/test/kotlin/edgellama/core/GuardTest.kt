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

class GuardTest {
    @get:Rule
    val folder = TemporaryFolder()

    private val json = Vectors.json("guard.json")
    private val raw = Json.parse(File(Vectors.directory, "guard.json").readText()) as Map<*, *>
    private val tokenizer = Vectors.tokenizer(json.string("tokenizer"))

    private fun classifier(name: String) = Classifier.of(json.objectOf("classifiers").objectOf(name))

    /** The classifier whose conversation loses white space around contents, or does not. */
    private fun trimming(trim: Boolean): Classifier {
        val section = HashMap((raw["classifiers"] as Map<*, *>)["several"] as Map<*, *>)
        val guard = HashMap(section["guard"] as Map<*, *>)
        guard["conversation"] = HashMap(guard["conversation"] as Map<*, *>).also { it["trim"] = trim }
        section["guard"] = guard
        return Classifier.of(JsonObject.parse(Json.write(section), "section"))
    }

    @Test
    fun encodesConversationsAsPython() {
        val cases = json.objects("conversations")
        val judges = listOf(true, false).associateWith(::trimming)
        assertTrue(cases.size > 30)
        for ((case, data) in cases.zip(raw["conversations"] as List<*>)) {
            val judge = judges.getValue(case.boolean("trim"))
            val length = case.int("context_length")
            val encode = {
                if ((data as Map<*, *>)["messages"] is String) {
                    judge.encode(case.string("messages"), tokenizer, length)
                } else {
                    judge.encode(Vectors.messages(case), tokenizer, length)
                }
            }
            when (val reason = case.stringOrNull("refused")) {
                null -> assertContentEquals(case.ints("ids"), encode(), data.toString())
                "context" -> assertFailsWith<ContextException>(data.toString()) { encode() }
                "roles" -> assertTrue("roles" in assertFailsWith<TokenizerException>(data.toString()) { encode() }.text)
                else -> error(reason)
            }
        }
    }

    @Test
    fun answersAsPython() {
        val cases = json.objects("answers")
        assertTrue(cases.size > 100)
        for ((case, data) in cases.zip(raw["answers"] as List<*>)) {
            val judge = classifier(case.string("classifier"))
            val calibration = Calibration("", 0.5, Threshold(Guard.UNSAFE, 0.0)).takeIf { case.boolean("flags") }
            val calls = ArrayList<List<Int>>()
            val drawn = VectorModel(0.0, judge.rows, case.int("start"))
            val model = object : LogitsModel by drawn {
                override fun forward(tokens: IntArray, position: Int): FloatArray {
                    calls.add(listOf(position) + tokens.toList())
                    return drawn.forward(tokens, position)
                }
            }
            val length = case.int("context_length")
            val found = TextClassifier(judge, calibration, tokenizer, length).classify(Session(model), case.string("text"))!!
            val expected = case.objectOf("answer")
            assertEquals(expected.string("label"), found.label, "$data")
            assertEquals<List<Any?>?>(expected.list("categories"), found.categories, "$data")
            assertEquals(if (expected.isNull("flagged")) null else expected.boolean("flagged"), found.flagged, "$data")
            assertEquals(expected.int("tokens"), found.tokens, "$data")
            expected.doubles("probabilities").zip(found.probabilities).forEach { (e, f) ->
                assertTrue(abs(e - f.second) <= 1e-12, "$data")
            }
            val wanted = case.list("calls").map { call -> (call as List<*>).map { (it as Long).toInt() } }
            assertEquals(wanted, calls.drop(1), "$data")
        }
    }

    @Test
    fun opensWhatPythonOpens() {
        for ((case, data) in json.objects("sections").zip(raw["sections"] as List<*>)) {
            val directory = folder.newFolder().also { File(Vectors.directory, "classifier").copyRecursively(it, true) }
            Vectors.classify(directory, (data as Map<*, *>)["classifier"], data["label_rows"])
            if (case.boolean("opens")) {
                assertEquals(case.int("label_rows"), Bundle.open(directory).outputSize, case.string("name"))
            } else {
                val error = assertFailsWith<BundleException>(case.string("name")) { Bundle.open(directory) }
                assertTrue("classifier" in error.text, error.text)
            }
        }
    }

    @Test
    fun refusesAConversationWithoutAGuardAndAGuardWithoutItsLabel() {
        val plain = Bundle.open(File(Vectors.directory, "classifier"))
        val judge = TextClassifier.of(plain, "xnnpack", tokenizer)
        val session = Session(FixedModel(FloatArray(6)))
        assertNull(judge.classify(session, "a")!!.categories)
        val error = assertFailsWith<TokenizerException> { judge.classify(session, listOf(Message(Role.USER, "a"))) }
        assertTrue("got a conversation" in error.text, error.text)
        val section = HashMap((raw["classifiers"] as Map<*, *>)["several"] as Map<*, *>)
        val text = Json.write(section).replace("\"unsafe\"", "\"bad\"")
        val wrong = assertFailsWith<BundleException> { Classifier.of(JsonObject.parse(text, "section")) }
        assertTrue("without a token for the label unsafe" in wrong.text, wrong.text)
    }

    @Test
    fun refusesBrokenLogitsInAnAnswerAndStops() {
        val judge = TextClassifier(classifier("several"), null, tokenizer, 256)
        val rows = judge.classifier.rows
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY)) {
            val inner = VectorModel(0.0, rows, 100)
            val model = object : LogitsModel by inner {
                override fun forward(tokens: IntArray, position: Int) = inner.forward(tokens, position).also {
                    if (position == 0) it[1] = 99f else it[rows - 1] = bad
                }
            }
            val error = assertFailsWith<ModelException> { judge.classify(Session(model), "a") }
            assertTrue("no finite numbers" in error.text, error.text)
            var asked = 0
            assertNull(judge.classify(Session(model), "a") { ++asked > 1 }) // after the prefill
        }
    }
}
