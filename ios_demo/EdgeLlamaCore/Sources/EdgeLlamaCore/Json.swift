/// A JSON value. A number without fraction and exponent that fits is an `int`. Written with sorted keys.
public enum Json: Equatable, Sendable {
    case null
    case bool(Bool)
    case int(Int)
    case double(Double)
    case string(String)
    case array([Json])
    /// Members in the file's order. Not a dictionary: Swift takes names for equal that are written in other bytes.
    case object([JsonMember])

    /// A number, null where `value` is none or not finite.
    static func number(_ value: Double?) -> Json {
        guard let value: Double = value, value.isFinite else { return .null }
        return .double(value)
    }

    static func object(_ members: [String: Json]) -> Json {
        .object(members.map { JsonMember(name: $0.key, value: $0.value) })
    }
}

public struct JsonMember: Equatable, Sendable {
    public let name: String
    public let value: Json
}

struct JsonError: Error {
    let message: String
}

extension Json {
    /// The JSON text, with a line end.
    public func written() -> String {
        var out: String = ""
        write(line: "\n", into: &out)
        out.append("\n")
        return out
    }

    private func write(line: String, into out: inout String) {
        let inner: String = line + "  "
        switch self {
        case .null: out.append("null")
        case .bool(let value): out.append(value ? "true" : "false")
        case .int(let value): out.append(String(value))
        case .double(let value): out.append(value.isFinite ? String(value) : "null")
        case .string(let value): Json.quote(value, into: &out)
        case .array(let items):
            out.append("[")
            for (index, item) in items.enumerated() {
                out.append(index == 0 ? inner : "," + inner)
                item.write(line: inner, into: &out)
            }
            out.append(items.isEmpty ? "]" : line + "]")
        case .object(let members):
            out.append("{")
            for (index, member) in members.sorted(by: { $0.name < $1.name }).enumerated() {
                out.append(index == 0 ? inner : "," + inner)
                Json.quote(member.name, into: &out)
                out.append(": ")
                member.value.write(line: inner, into: &out)
            }
            out.append(members.isEmpty ? "}" : line + "}")
        }
    }

    private static func quote(_ text: String, into out: inout String) {
        out.append("\"")
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": out.append("\\\"")
            case "\\": out.append("\\\\")
            case "\n": out.append("\\n")
            default:
                if scalar.value < 0x20 {
                    let digits: String = String(scalar.value, radix: 16)
                    out.append("\\u" + String(repeating: "0", count: 4 - digits.count) + digits)
                } else {
                    out.unicodeScalars.append(scalar)
                }
            }
        }
        out.append("\"")
    }
}
