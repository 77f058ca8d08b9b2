package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class ChatFormatTest {
    private val json = Vectors.json("chat.json")
    private val formats = json.objectOf("formats").entries().mapValues { ChatFormat.of(it.value) }

    @Test
    fun rendersAsPython() {
        val cases = json.objects("cases")
        assertTrue(cases.size > 100)
        for (case in cases) {
            val format = formats.getValue(case.string("format"))
            val found = format.render(Vectors.messages(case), case.boolean("add_generation_prompt"))
            assertEquals(case.string("text"), found)
        }
    }

    @Test
    fun refusesOtherOrdersOfRoles() {
        for (case in json.objects("refused")) {
            val format = formats.getValue(case.string("format"))
            assertFailsWith<TokenizerException> {
                format.render(Vectors.messages(case), case.boolean("add_generation_prompt"))
            }
        }
    }
}
