import Foundation

/// A parsed JSON object with its place in a file, so that what is missing or of another type is named.
struct JsonObject: Sendable {
    let members: [JsonMember]
    private let place: String

    private init(members: [JsonMember], place: String) {
        self.members = members
        self.place = place
    }

    /// The object in the JSON `text` of the file called `name`.
    static func parse(_ text: [UInt8], name: String) throws -> JsonObject {
        let value: Json
        do {
            value = try Json.parse(text)
        } catch let error as JsonError {
            throw EdgeLlamaError.bundle("\(name): \(error.message)")
        }
        guard case .object(let members) = value else { throw EdgeLlamaError.bundle("\(name) is not an object") }
        return JsonObject(members: members, place: name)
    }

    func string(_ name: String) throws -> String {
        guard case .string(let value) = self[name] else { throw wrong(name, "a string") }
        return value
    }

    func bool(_ name: String) throws -> Bool {
        guard case .bool(let value) = self[name] else { throw wrong(name, "true or false") }
        return value
    }

    func bool(_ name: String, or fallback: Bool) throws -> Bool {
        isNull(name) ? fallback : try bool(name)
    }

    func double(_ name: String) throws -> Double {
        guard let value: Double = JsonObject.asDouble(self[name]) else { throw wrong(name, "a number") }
        return value
    }

    func int(_ name: String) throws -> Int {
        guard case .int(let value) = self[name] else { throw wrong(name, "a whole number") }
        return value
    }

    func object(_ name: String) throws -> JsonObject {
        try asObject(self[name], name)
    }

    func objectOrNil(_ name: String) throws -> JsonObject? {
        isNull(name) ? nil : try object(name)
    }

    func stringOrNil(_ name: String) throws -> String? {
        isNull(name) ? nil : try string(name)
    }

    func array(_ name: String) throws -> [Json] {
        guard case .array(let items) = self[name] else { throw wrong(name, "a list") }
        return items
    }

    func objects(_ name: String) throws -> [JsonObject] {
        var found: [JsonObject] = []
        for (index, item) in try array(name).enumerated() {
            found.append(try asObject(item, "\(name)[\(index)]"))
        }
        return found
    }

    /// Whole numbers from 0 to 2^31 - 1.
    func ints(_ name: String) throws -> [Int] {
        try array(name).map { item in
            guard case .int(let value) = item else { throw wrong(name, "a list of whole numbers") }
            if value < 0 || value > Int(Int32.max) { throw EdgeLlamaError.bundle("\(place).\(name) is out of bounds") }
            return value
        }
    }

    func doubles(_ name: String) throws -> [Double] {
        try array(name).map { item in
            guard let value: Double = JsonObject.asDouble(item) else { throw wrong(name, "a list of numbers") }
            return value
        }
    }

    func isNull(_ name: String) -> Bool { self[name] == .null }

    /// The value of a member, null where there is none.
    private subscript(name: String) -> Json {
        members.last { $0.name == name }?.value ?? .null
    }

    /// A member's value as an object.
    func asObject(_ value: Json, _ name: String) throws -> JsonObject {
        guard case .object(let members) = value else { throw wrong(name, "an object") }
        return JsonObject(members: members, place: "\(place).\(name)")
    }

    private static func asDouble(_ value: Json) -> Double? {
        switch value {
        case .int(let number): return Double(number)
        case .double(let number): return number
        default: return nil
        }
    }

    private func wrong(_ name: String, _ kind: String) -> EdgeLlamaError {
        EdgeLlamaError.bundle("\(place).\(name) is not \(kind)")
    }
}
