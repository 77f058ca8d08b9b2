/// Cuts text into the words that are merged by themselves.
///
/// Written by hand, because regular expressions mean different things on a JVM, on Android and on Apple devices
/// (what \s and \p{L} match). The alternatives of each expression are tried in their order.
enum PreTokenizer: Sendable {
    /// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    case gpt2
    /// Every digit is a word of its own, between them as GPT-2.
    case smollm2
    /// The expression `llama3Split`.
    case llama3

    static let llama3Split: String =
        #"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"#
        + #" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#

    /// The pre-tokenizer that tokenizer.json describes. Throws for any other.
    static func of(_ json: JsonObject?) throws -> PreTokenizer {
        var steps: [JsonObject] = []
        if let json: JsonObject = json {
            steps = try json.string("type") == "Sequence" ? json.objects("pretokenizers") : [json]
        }
        let kinds: [String] = try steps.map(kind)
        switch kinds {
        case ["ByteLevel with words"]: return .gpt2
        case ["Digits", "ByteLevel with words"]: return .smollm2
        case ["Llama 3", "ByteLevel"]: return .llama3
        default:
            throw EdgeLlamaError.tokenizer(
                "this app cannot split text as this model does (pre-tokenizer: \(kinds))",
                remedy: "Use a model with a byte-level tokenizer, such as SmolLM2 or Llama 3."
            )
        }
    }

    private static func kind(_ step: JsonObject) throws -> String {
        let type: String = try step.string("type")
        switch type {
        case "Digits":
            if try step.bool("individual_digits") { return "Digits" }
            return "Digits in groups"
        case "ByteLevel":
            if try step.bool("add_prefix_space") { return "ByteLevel with a space before" }
            return try step.bool("use_regex") ? "ByteLevel with words" : "ByteLevel"
        case "Split":
            let isolated: Bool = try step.string("behavior") == "Isolated"
            let inverted: Bool = try step.bool("invert")
            let pattern: String? = try step.object("pattern").stringOrNil("Regex")
            return isolated && !inverted && pattern == llama3Split ? "Llama 3" : type
        default:
            return type
        }
    }

    /// Ends of the words in `points`, in order; the first word starts at 0.
    func ends(_ points: [UInt32]) -> [Int] {
        var ends: [Int] = []
        var start: Int = 0
        while start < points.count {
            let end: Int = self == .smollm2 ? PreTokenizer.pieceEnd(points, start) : points.count
            while start < end {
                let scanner: Scanner = Scanner(points: points, end: end)
                start = self == .llama3 ? scanner.llama3Word(start) : scanner.gpt2Word(start)
                ends.append(start)
            }
        }
        return ends
    }

    private static func pieceEnd(_ points: [UInt32], _ start: Int) -> Int {
        if CodePoints.digits.contains(points[start]) { return start + 1 }
        var end: Int = start
        while end < points.count && !CodePoints.digits.contains(points[end]) { end += 1 }
        return end
    }
}

/// Finds the end of one word of points[..<end].
private struct Scanner {
    let points: [UInt32]
    let end: Int

    private static let space: UInt32 = 0x20
    private static let apostrophe: UInt32 = 0x27
    private static let longS: UInt32 = 0x17f  // ſ, which is an s where case is ignored
    private static let contractions: [[UInt32]] = ["s", "t", "re", "ve", "m", "ll", "d"].map { (text: String) -> [UInt32] in
        text.unicodeScalars.map { $0.value }
    }

    func gpt2Word(_ start: Int) -> Int {
        if let found: Int = contraction(start, ignoreCase: false) { return found }
        let body: Int = points[start] == Scanner.space && start + 1 < end ? start + 1 : start
        let c: UInt32 = points[body]
        if letter(c) { return run(body, letter) }
        if number(c) { return run(body, number) }
        if other(c) { return run(body, other) }
        return spaces(start)
    }

    func llama3Word(_ start: Int) -> Int {
        if let found: Int = contraction(start, ignoreCase: true) { return found }
        let c: UInt32 = points[start]
        let prefixed: Bool = !newline(c) && !letter(c) && !number(c) && start + 1 < end && letter(points[start + 1])
        if letter(c) || prefixed { return run(start + 1, letter) }
        if number(c) { return min(run(start, number), start + 3) }
        let body: Int = c == Scanner.space && start + 1 < end ? start + 1 : start
        if other(points[body]) { return run(run(body, other), newline) }
        let whole: Int = run(start, white)
        for i in stride(from: whole - 1, through: start, by: -1) where newline(points[i]) { return i + 1 }
        return spaces(start)
    }

    /// White space: all of it at the end of the text, else all but the last, which belongs to the next word.
    private func spaces(_ start: Int) -> Int {
        let whole: Int = run(start, white)
        return whole == end || whole == start + 1 ? whole : whole - 1
    }

    private func contraction(_ start: Int, ignoreCase: Bool) -> Int? {
        if points[start] != Scanner.apostrophe { return nil }
        for text in Scanner.contractions where start + text.count < end {
            var fits: Bool = true
            for (i, c) in text.enumerated() where !same(points[start + 1 + i], c, ignoreCase) { fits = false }
            if fits { return start + 1 + text.count }
        }
        return nil
    }

    private func same(_ point: UInt32, _ c: UInt32, _ ignoreCase: Bool) -> Bool {
        if point == c { return true }
        return ignoreCase && (point == c - 0x20 || (c == 0x73 && point == Scanner.longS))
    }

    private func run(_ start: Int, _ belongs: (UInt32) -> Bool) -> Int {
        var at: Int = start
        while at < end && belongs(points[at]) { at += 1 }
        return at
    }

    private func letter(_ point: UInt32) -> Bool { CodePoints.letters.contains(point) }

    private func number(_ point: UInt32) -> Bool { CodePoints.numbers.contains(point) }

    private func white(_ point: UInt32) -> Bool { CodePoints.spaces.contains(point) }

    private func other(_ point: UInt32) -> Bool { !white(point) && !letter(point) && !number(point) }

    private func newline(_ point: UInt32) -> Bool { point == 0x0d || point == 0x0a }
}
